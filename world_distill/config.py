"""What a config file imports.

from world_distill.config import default_config

def get_config(arg=""):
c = default_config()          # every section at its defaults, see `world-distill train --help-config`
c.rollout.group = 24
return c
"""

from world_distill.errors import UserError as UserError
from world_distill.errors import did_you_mean as did_you_mean
from world_distill.settings.defaults import default_config as default_config
from world_distill.settings.loading import load_config as load_config
from world_distill.settings.loading import override as override
from world_distill.settings.loading import parse_arg as parse_arg
