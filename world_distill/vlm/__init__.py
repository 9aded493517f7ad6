"""Talking to vision-language models: requests to servers that may fail, and models in this process."""
