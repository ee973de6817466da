"""Where facts can be kept: one module per place, behind the protocols of `base`."""
