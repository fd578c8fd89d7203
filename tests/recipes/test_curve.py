"""Cost against precision: counts by hand, and differences in the standard errors of the most expensive setting."""

from recipes.emoji_artists import curve


def test_forward_passes_are_counted_for_images_and_questions() -> None:
    point = curve.Point("a row", timesteps=5, checkpoints=3)
    assert point.per_image == 15
    assert point.per_query == 130  # 50 steps with guidance, then 15 states under two conditions


def test_the_page_tells_how_many_standard_errors_a_setting_is_below_the_most_expensive() -> None:
    def row(mean: float) -> dict[str, dict[str, float]]:
        return {name: {"mean": mean, "low": mean - 0.196, "high": mean + 0.196} for name in curve.FIGURES}

    rows = {point.row: row(0.5) for point in curve.POINTS} | {curve.MOST: row(0.8), "1 timestep": row(0.9)}
    lines = curve.page(rows, "command").splitlines()
    [one] = [line for line in lines if line.startswith("| 1 timesteps")]
    assert one.split(" | ")[1:4] == ["3", "106", "0.90 (-1.0)"]
    [default] = [line for line in lines if line.startswith("| **5 timesteps x 3")]
    assert "0.50 (+3.0)" in default
    [most] = [line for line in lines if "16,384 numbers" in line and line.startswith("|")]
    assert "0.80 |" in most
    assert "(" not in most
