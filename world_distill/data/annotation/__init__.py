"""Tasks and solutions for images, written by a vision-language model."""
