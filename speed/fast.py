"""Placeholder until the fast forms land."""


def accelerate(model, compile=False, keep_shares=True):
    pass
