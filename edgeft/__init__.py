"""edgeft: a language model and your own examples become a small, measured expert for phones, laptops and boards."""

__version__ = "0.1.0"
