import pytest

from data.schemas import InputError
from reports.leaderboard.report import markdown, page, write_leaderboard
from reports.leaderboard.tables import Board
from reports.parts import NOTHING
from tests.reports.leaderboard.boards import ABOUT, board_rows


def lines(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def section(text, title):
    return text.partition(f"## {title}")[2].partition("\n## ")[0]


def test_markdown_by_hand():
    text = markdown(Board.of(board_rows(["popularity", "a/dense", "a|b"], seeds=(0, 1))), ABOUT)
    slices = section(text, "All test users (40 users)")
    assert lines(slices, "| a/dense ") == [f"| a/dense | {' | '.join(['0.0100 ± 0.0007 (0.0090 to 0.0200)'] * 6)} |"]
    assert slices.index("a\\|b") < slices.index("a/dense") < slices.index("popularity")  # best first
    warm = section(text, "Warm: users whose target occurs in training (37 users)")
    assert lines(warm, "| A paper's model (published)") == [
        f"| A paper's model (published) | {NOTHING} | 0.0931{f' | {NOTHING}' * 4} |"
    ]
    against = section(text, "Against the best baseline")
    assert "by validation NDCG@10 is popularity" in against
    assert "| a/dense | ndcg@10 | -0.0150 (-0.0300 to 0.0010, includes zero, p 0.2) |" in against
    assert "| a\\|b minus popularity | cold | ndcg@10 | +0.2500 (0.1250 to 0.5000, excludes zero, p 0.012) |" in text
    runs = section(text, "Runs")
    assert (
        f"| 1,234,567 (stores a count per item) | 44.0, 44.0 | {NOTHING} | 1.3, 1.3 | 45.0 | Abacus (1 thread) |"
        in runs
    )
    assert "configs/a.gin (seeds 0, 1)" in runs
    assert "| A paper's model (published) | a paper | in-set users stand under warm |" in text
    assert text.strip().endswith("the same command with --recompute.")


def test_a_slice_without_users_is_said_to_be_empty_and_has_no_numbers():
    text = markdown(Board.of(board_rows(["popularity", "sasrec"], cold_users=0)), ABOUT)
    cold = section(text, "Cold: users whose target does not occur in training (0 users)")
    assert "Empty: this data set and split has no such target" in cold
    assert "|" not in cold
    assert lines(section(text, "Against"), "| sasrec | ndcg@10 ")[0].endswith("| no users |")


def test_a_difference_without_a_user_who_differs_has_no_interval():
    rows = board_rows(["popularity", "sasrec"])
    rows[2]["against_best_baseline"]["cold"]["ndcg@10"] |= {"mean": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}
    against = section(markdown(Board.of(rows), ABOUT), "Against")
    assert lines(against, "| sasrec | ndcg@10 ")[0].endswith("| +0.0000 (no user differs) |")


def test_comparisons_say_what_their_intervals_leave_out():
    text = markdown(Board.of(board_rows(["popularity", "sasrec"])), ABOUT)
    for title in ("Against the best baseline", "Hybrid against generative"):
        assert "Neither allows for the number of comparisons" in section(text, title)


def test_seeds_with_other_numbers_of_threads_are_told():
    rows = board_rows(["popularity"], seeds=(0, 1))
    rows[1]["run"]["threads"] = [2, 1]
    assert "| Abacus (1 or 2 threads) |" in section(markdown(Board.of(rows), ABOUT), "Runs")


def test_published_rows_are_explained_where_there_are_any():
    rows = board_rows(["popularity"])
    assert "Rows marked “published”" in markdown(Board.of(rows), ABOUT)
    assert "published" not in markdown(Board.of(rows[:-1]), ABOUT)


def test_what_failed_and_what_is_quick_is_said():
    rows = board_rows(["popularity"])
    rows[0]["settings"] |= {"quick": True, "failed": ["hstu, seed 0: error: no"]}
    text = markdown(Board.of(rows), ABOUT)
    assert "A quick run of a few steps each" in text
    assert "Runs that failed and are missing here: hstu, seed 0: error: no." in text


def test_the_page_has_a_line_with_bars_for_every_model_and_escapes_names():
    names = ["popularity", *(f"model{index}" for index in range(8)), "<b>bold</b>"]
    html = page(Board.of(board_rows(names)), ABOUT)
    assert html.count('<path class="line ') == html.count('<path class="bound ') == 4 * len(names)
    assert '<path class="line l1 dashes"' in html
    assert ">1\N{EN DASH}7</span>" in html
    assert "<b>" not in html
    assert "&lt;b&gt;bold&lt;/b&gt;" in html
    assert html.index('id="results"') < html.index('id="plots"') < html.index('id="comparisons"')


def test_both_files_are_written_or_the_place_is_named(tmp_path):
    rows = board_rows(["popularity"])
    assert [path.name for path in write_leaderboard(tmp_path / "new", "demo", rows, about=ABOUT)] == [
        "demo.md",
        "demo.html",
    ]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*demo.md"):
        write_leaderboard(tmp_path / "file", "demo", rows, about=ABOUT)
