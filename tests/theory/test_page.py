"""rpo.theory.__main__: it prints what it checks, fails where a check fails, and its slopes are the theorem's."""

import pytest

from rpo import losses
from rpo.theory import __main__ as page
from rpo.theory import checks
from tests.helpers.mutations import scaled


def test_slopes_at_three_sizes():
    """Over N = 100, 1600, 25600 RPO's gap falls as N^-1/2 within [-0.65, -0.40]; DPO's stays, within [-0.1, 0.1]."""
    by_size = {num: page.policies(num, 40, tuple(page.SLOPES)) for num in (100, 1600, 25600)}
    for method, (low, high) in page.SLOPES.items():
        assert low <= page.fitted(by_size, method) <= high


def shrink(monkeypatch):
    for name, value in {"SEEDS": 6, "SIZES": [100, 6400], "BETAS": [0.1], "ETAS": [0.0, 0.1], "STEPS": 60}.items():
        monkeypatch.setattr(page, name, value)
    monkeypatch.setattr(checks, "SETTINGS", checks.SETTINGS[:1])


def test_page(monkeypatch, capsys, tmp_path):
    """The page prints every check, no failure, both slopes, and writes four pictures to the given folder."""
    shrink(monkeypatch)
    monkeypatch.setattr("sys.argv", ["theory_page", str(tmp_path / "new" / "figures")])
    page.main()
    text = capsys.readouterr().out
    assert "FAILS" not in text and all(c.what in text for c in checks.nonconvex())
    assert text.count("slope") == 5
    pictures = sorted((tmp_path / "new" / "figures").glob("*.png"))
    assert [p.name for p in pictures] == ["beta_eta.png", "paths.png", "rates.png", "uncovered.png"]
    assert all(str(p) in text and p.stat().st_size > 5000 for p in pictures)


def test_page_fails_with_a_wrong_loss(monkeypatch, capsys, tmp_path):
    """With half a percent in the SFT coefficient the page marks the checks and exits with an error, before any figure."""
    shrink(monkeypatch)
    monkeypatch.setattr(losses, "sft_loss", scaled("sft_loss", 1.005))
    monkeypatch.setattr("sys.argv", ["theory_page", str(tmp_path)])
    with pytest.raises(SystemExit, match="golden24: policy"):
        page.main()
    assert "FAILS" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_page_needs_a_folder(monkeypatch, tmp_path):
    """A path that is a file is refused in one line before anything is computed."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["theory_page", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="error: .*file: .*; give a writable folder") as caught:
        page.main()
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_whole_page(monkeypatch, capsys, tmp_path):
    """`make theory` as it is: 50 games, N = 100 to 25600, 40 seeds; slopes and checks hold, or it would exit."""
    monkeypatch.setattr("sys.argv", ["theory_page", str(tmp_path)])
    page.main()
    assert len(list(tmp_path.glob("*.png"))) == 4 and "FAILS" not in capsys.readouterr().out
