"""Questions to a vision-language model about a clip, and a memory of its answers."""
