"""One browser for all tests of pages."""

import pytest

from tests.reports.browser import open_browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened
