"""Durable runs: joins workflows and the store, which records their steps."""
