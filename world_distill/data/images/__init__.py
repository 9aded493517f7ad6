"""Scene images: finding, reading and filtering them."""
