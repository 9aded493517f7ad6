"""Settings: config files, what each key means, and which do not go together."""
