"""The addresses of the pages."""

from django.contrib import admin
from django.urls import path

from . import views

urlpatterns = [
    path("", views.home, name="home"),
    path("orders/<uuid:id>", views.order, name="order"),
    path("admin/", admin.site.urls),
]
