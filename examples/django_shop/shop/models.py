"""Products with their stock, and orders."""

from django.db import models


class Product(models.Model):
    """Something to buy. The database refuses a stock below zero."""

    name = models.CharField(max_length=100)
    cents = models.PositiveIntegerField()
    stock = models.PositiveIntegerField()

    def __str__(self) -> str:
        return self.name


class Order(models.Model):
    """An order. Its id comes from the form, so that a second click is the same order."""

    id = models.UUIDField(primary_key=True)
    product = models.ForeignKey(Product, on_delete=models.PROTECT)
    quantity = models.PositiveIntegerField()
    payment = models.CharField(max_length=100, blank=True)

    def __str__(self) -> str:
        return f"{self.quantity} × {self.product}"
