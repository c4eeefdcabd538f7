"""Tensors that outlive the call that makes them."""

import functools

import torch


def lasting(function):
    """Decorates a function that allocates tensors which are changed later on, maybe outside of the caller's
    ``torch.inference_mode``: tensors of that mode could not be. Nothing in it has gradients."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run
