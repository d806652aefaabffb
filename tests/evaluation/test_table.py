from evaluation.table import format_metrics


def metrics_of(ranker: str, split: str, name: str, value: float) -> dict[str, float]:
    prefix = f"{ranker}/{split}/{name}/"
    bounds = {f"{prefix}recall@10_ci95_low": value - 0.01, f"{prefix}recall@10_ci95_high": value + 0.02}
    return {f"{prefix}count": 1234, f"{prefix}recall@10": value, **bounds}


def test_table_is_aligned_and_shows_intervals_and_counts():
    metrics = {
        **metrics_of("generative", "test", "all", 0.05),
        **metrics_of("popularity", "test", "all", 0.02),
        **metrics_of("generative", "valid", "all", 0.9),
        "generative/test/cold/count": 0,
        "popularity/test/cold/count": 0,
    }
    assert format_metrics(metrics, split="test").splitlines() == [
        "slice  users  metric     generative               popularity",
        "-----  -----  ---------  -----------------------  -----------------------",
        "all    1,234  recall@10  0.0500 [0.0400, 0.0700]  0.0200 [0.0100, 0.0400]",
        "warm       0  -          -                        -",
        "cold       0  -          -                        -",
    ]


def test_a_metric_that_one_ranker_lacks_is_a_dash():
    metrics = {**metrics_of("generative", "test", "all", 0.05), "short/test/all/count": 1234}
    assert format_metrics(metrics, split="test").splitlines()[2].split()[-1] == "-"
