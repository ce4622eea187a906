"""A picture says what it shows, also away from the folder that it was drawn in."""

import matplotlib.figure

from support.run import report


def test_the_loss_curves_name_their_method_and_model(tmp_path, monkeypatch):
    drawn, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda figure, *args, **options: (drawn.append(figure), save(figure, *args, **options)),
    )
    results = dict(method="dora", model="hub/some-model", before=None, after={"test": None})
    line = {"step": 1, "phase": "train", "train_loss": 0.5}
    report.plot_losses(tmp_path / "loss.png", [line], results)
    assert drawn[0].axes[0].get_title() == "dora on some-model"
