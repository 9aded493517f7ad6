"""The command line `world-distill`: a module a verb, with its flags and what it prints."""

from world_distill.cli.command import main as main
