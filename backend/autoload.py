"""Runs while torch is being imported (entry point group ``torch.backends``): imports nothing heavy and can never raise."""


def autoload() -> None:
    return None
