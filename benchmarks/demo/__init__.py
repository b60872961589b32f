"""Vanilla beside spectral on scikit-learn's digits in a minute: python -m benchmarks.demo."""
