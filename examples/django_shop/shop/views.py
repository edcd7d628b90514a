"""The shop window, and the view that accepts an order."""

import uuid

from django.db import transaction
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_http_methods, require_safe

from .models import Order, Product
from .workflows import checkout, durable


@require_safe
def home(request: HttpRequest) -> HttpResponse:
    """Show the products, each with a form that carries the id of a new order."""
    products = [(product, uuid.uuid4()) for product in Product.objects.order_by("name")]
    return render(request, "shop/home.html", {"products": products})


@require_http_methods(["GET", "HEAD", "POST"])
def order(request: HttpRequest, id: uuid.UUID) -> HttpResponse:
    """Accept an order, or show it. A repeated POST finds the order that the first one created."""
    if request.method == "POST":
        try:
            product = Product.objects.get(pk=request.POST["product"])
            quantity = int(request.POST.get("quantity", 1))
        except (KeyError, ValueError, Product.DoesNotExist):
            return HttpResponseBadRequest("product must be the id of a product, quantity a number")
        if not 1 <= quantity <= 100:
            return HttpResponseBadRequest("quantity must be from 1 to 100")
        with transaction.atomic():  # both the order and its workflow are stored, or neither is
            made, _ = Order.objects.get_or_create(
                pk=id, defaults={"product": product, "quantity": quantity}
            )
            durable.submit(f"checkout-{made.pk}", checkout, str(made.pk))
        return redirect("order", id=made.pk)
    made = get_object_or_404(Order.objects.select_related("product"), pk=id)
    run = durable.get(f"checkout-{made.pk}")
    return render(request, "shop/order.html", {"order": made, "run": run})
