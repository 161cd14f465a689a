"""What the documents tell to type where devices are attached works, and prints what they show."""

from __future__ import annotations

import pytest

from nbdlink.cli.main import main
from tests.documents.blocks import TYPED
from tests.documents.typed import type_page

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("runtime_directory")]


@pytest.mark.timeout(600)  # a page's commands one after the other, under emulation
@pytest.mark.parametrize("page", TYPED["guest"])
def test_what_is_told_to_type_works(page, tmp_path):
    try:
        assert type_page(page, "guest", tmp_path)
    finally:
        main(["detach", "--all", "--force"])
