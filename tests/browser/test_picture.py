"""The picture of README.md."""

from pathlib import Path

from tests.browser.pages import write_page
from tests.browser.picture import HEIGHT, WIDTH, take_picture


def size_of(picture: Path) -> tuple[int, int]:
    """Width and height of a PNG file: two big-endian numbers after the 8 bytes of its signature and 8 of its first chunk."""
    head = picture.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20]), int.from_bytes(head[20:24])


def test_the_picture_is_the_upper_part_of_a_report(chromium, tmp_path):
    write_page(tmp_path / "report.html", None, None)
    take_picture(chromium, tmp_path / "report.html", tmp_path / "report.png")
    assert size_of(tmp_path / "report.png") == (WIDTH, HEIGHT)
    # a page of one colour takes 5 kB
    assert (tmp_path / "report.png").stat().st_size > 20_000


def test_the_picture_of_the_readme_was_taken_like_this():
    assert size_of(Path(__file__).parents[2] / ".github" / "report.png") == (WIDTH, HEIGHT)
