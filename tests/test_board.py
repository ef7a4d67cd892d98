"The board: what it shows and where, what it costs, what it forgets and what it remembers."
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ppo_ddpm.data import seeded, to_grid
from ppo_ddpm.engine import board as module
from ppo_ddpm.engine.board import Board, History, denoising_strip, log_record, reward_histogram, save_gif, save_grid


def pictures(*shape): return torch.rand(shape, generator=seeded("board", *shape)) * 2 - 1


def record(epoch, **more):
    return {"epoch": epoch, "reward": .1 * epoch, "kl": .2, "clip_frac": .1, "samples": pictures(6, 1, 8, 8) * epoch / 100} | more


class Image7:
    "IPython 7.34's Image as far as the board needs it: it has no `alt=`."
    def __init__(self, data=None, url=None, filename=None, format=None, embed=None, width=None, height=None, retina=False,
                 unconfined=False, metadata=None):
        self.data, self.format, self.metadata = data, format, metadata


@pytest.fixture
def kernel(monkeypatch):
    "A kernel with IPython 7 and a clock that is set by hand; keeps what was displayed."
    shown = []
    class Handle:
        def update(self, picture): shown.append(("replace", picture))
    def display(picture, display_id=None):
        shown.append(("new", picture))
        return Handle() if display_id else None
    ipython = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()), version_info=(8, 24))   # matplotlib reads the version
    monkeypatch.setitem(module.sys.modules, "IPython", ipython)
    monkeypatch.setitem(module.sys.modules, "IPython.display", SimpleNamespace(Image=Image7, display=display))
    clock = SimpleNamespace(now=0.)
    clock.monotonic = clock.thread_time = lambda: clock.now
    monkeypatch.setattr(module, "time", clock)
    return SimpleNamespace(shown=shown, clock=clock)


def drawing_costs(monkeypatch, clock, cost):
    def png(self):
        clock.now += cost
        return b""
    monkeypatch.setattr(Board, "_repr_png_", png)


# --- where it is shown -----------------------------------------------------------------------------------------------------
def test_one_output_is_replaced_in_place_with_words_for_it(kernel):
    with Board(3) as board:
        for epoch in 1, 2, 3:
            kernel.clock.now += 10
            board.update(record(epoch))
    assert [how for how, _ in kernel.shown] == ["new", "replace", "replace", "replace"]
    for _, picture in kernel.shown:
        assert picture.format == "png" and picture.data.startswith(b"\x89PNG")
        assert picture.metadata["alt"].startswith("Samples before and now")


@pytest.mark.parametrize("ipython", [None, SimpleNamespace(get_ipython=lambda: None), SimpleNamespace(get_ipython=lambda: object())],
                         ids=["no IPython", "no shell", "terminal"])
def test_outside_a_notebook_nothing_is_shown(monkeypatch, ipython, tmp_path):
    if ipython is None: monkeypatch.delitem(module.sys.modules, "IPython", raising=False)
    else: monkeypatch.setitem(module.sys.modules, "IPython", ipython)
    monkeypatch.setitem(module.sys.modules, "IPython.display", None)   # to import it is an error
    with Board() as board: board.update(record(1))
    assert board.output is None and board.save(tmp_path / "board.png").is_file()


def test_show_false_shows_nothing_in_a_notebook_either(kernel):
    with Board(show=False) as board: board.update(record(1))
    assert kernel.shown == []


@pytest.mark.parametrize("cost", [.001, .1, 2.])
@pytest.mark.parametrize("epoch_s", [.01, 1., 30.])
def test_drawing_takes_a_51st_of_the_time_at_most(kernel, monkeypatch, cost, epoch_s):
    drawing_costs(monkeypatch, kernel.clock, cost)
    board = Board(every_s=.5)
    for epoch in range(2000):
        kernel.clock.now += epoch_s
        board.update({"epoch": epoch})
    n, now = len(kernel.shown), kernel.clock.now
    assert n * cost <= now / 51 + cost           # the newest drawing has its pause before it
    assert n <= 1 + now / .5


def test_close_draws_although_the_pause_is_not_over(kernel, monkeypatch):
    drawing_costs(monkeypatch, kernel.clock, 1.)
    with Board() as board:
        for epoch in range(5): board.update({"epoch": epoch})
        assert len(kernel.shown) == 1
    assert len(kernel.shown) == 2


# --- what it shows ---------------------------------------------------------------------------------------------------------
def curves(board):
    "{title: points} of the figure."
    axes = module.board_figure(board.history, board.n_epochs, board.marks).axes
    return {ax.get_title(): ax.lines[0].get_xydata().tolist() for ax in axes if ax.lines}


def looks(board):
    "Axes of the samples before and now."
    axes = module.board_figure(board.history, board.n_epochs, board.marks).axes
    return axes[0], axes[3]


def test_gaps_and_numbers_that_are_none_do_no_harm(tmp_path):
    board = Board(n_epochs=5, marks={"before": 3., "floor": .5, "50 steps": 1., "other": 2.})
    board.update({"epoch": 0})
    board.update({"epoch": 1, "reward": 1., "fd": None, "kl": math.nan, "images/s": None, "left_s": math.inf})
    board.update({"epoch": 2, "reward": math.inf, "fd": torch.tensor(2.), "samples": None, "rewards": None, "left_s": math.nan})
    board.update({"epoch": 3, "reward": 3, "clip_frac": -math.inf, "images/s": 0, "left_s": 0, "note": "text"})
    found = curves(board)
    assert found["Reward"] == [[1, 1], [3, 3]] and found["Distance to real pictures"] == [[2, 2]]
    assert found["KL to the pretrained model (nats)"] == found["Share of clipped ratios"] == []
    assert module.status_line(board.history.newest).split("     ") == ["epoch 3", "0.0 images/s", "00:00 left"]
    assert Image.open(board.save(tmp_path / "board.png")).size == (960, 416)


def test_an_empty_board_can_be_saved(tmp_path):
    assert Image.open(Board().save(tmp_path / "deep" / "board.png")).format == "PNG"


def test_samples_that_are_not_numbers_are_drawn(tmp_path):
    board = Board()
    board.update({"epoch": 1, "samples": torch.full((4, 1, 8, 8), math.nan)})
    assert board.save(tmp_path / "board.png").is_file()


@pytest.mark.parametrize("n", [1, 2, 5, 18, 36, 100])
@pytest.mark.parametrize("channels", [1, 3])
def test_few_and_many_samples_before_and_now(n, channels, tmp_path):
    board = Board()
    for epoch in 1, 2:
        x = pictures(n, channels, 8, 8) / epoch
        board.update({"epoch": epoch, "samples": x})
    before, now = looks(board)
    assert (before.get_title(), now.get_title()) == ("From fixed noise, epoch 1", "From fixed noise, epoch 2")
    assert torch.allclose(torch.tensor(now.images[0].get_array().data), torch.tensor(to_grid(x[:18], 6)), atol=1e-3)
    assert before.images[0].get_array().shape == now.images[0].get_array().shape


def test_one_look_is_shown_once():
    board = Board()
    board.update(record(1))
    before, now = looks(board)
    assert before.images and not now.images and not now.axison


def test_axes_are_fixed_or_grow():
    board = Board(show=False)
    for epoch in range(1, 31): board.update({"epoch": epoch, "reward": 1.})
    limit = lambda n: module.board_figure(board.history, n, None).axes[1].get_xlim()
    assert limit(100) == (0, 100) and limit(None)[0] == 0 and 30 <= limit(None)[1] < 35


# --- what it keeps ---------------------------------------------------------------------------------------------------------
def test_frames_are_few_even_and_small():
    history = History()
    for epoch in range(500): history.update({"epoch": epoch, "samples": torch.zeros(50, 3, 130, 100)})
    epochs = list(history.frames)
    assert len(epochs) < 40 and epochs == list(range(0, 500, history.stride)) and list(history.last) == [499]
    assert history.frames[0].shape == (36, 3, 44, 34)


def test_kept_samples_hold_no_graph_and_no_memory_of_the_batch():
    history, x = History(), pictures(64, 1, 8, 8).requires_grad_()
    history.update({"epoch": 1, "samples": 2 * x})
    kept = history.first[1]
    assert not kept.requires_grad and kept.untyped_storage().nbytes() == 36 * 64 * 2


@pytest.mark.parametrize("stop", [0, 1, 39, 40, 77])
def test_state_goes_into_a_checkpoint_and_back(stop, tmp_path):
    whole, first, second = Board(100), Board(100), Board(100)
    for epoch in range(100):
        rec = record(epoch, **{"images/s": 3., "left_s": 100. - epoch})
        whole.update(rec)
        if epoch < stop: first.update(rec)
    torch.save(first.state_dict(), tmp_path / "board.pt")
    second.load_state_dict(torch.load(tmp_path / "board.pt", weights_only=True))
    for epoch in range(stop, 100): second.update(record(epoch, **{"images/s": 3., "left_s": 100. - epoch}))
    assert second._repr_png_() == whole._repr_png_()
    a, b = (board.save_gif(tmp_path / f"{k}.gif", scale=1) for k, board in enumerate((whole, second)))
    assert a.read_bytes() == b.read_bytes()


def test_a_state_does_not_change_afterwards():
    board = Board()
    board.update(record(1))
    state = board.state_dict()
    board.update(record(2))
    assert list(state["numbers"]["reward"]) == [1] and list(state["frames"]) == [1]
    other = Board()
    other.load_state_dict(state)
    other.update(record(3))
    assert list(state["numbers"]["reward"]) == [1] and list(state["frames"]) == [1]


# --- files -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n, channels", [(1, 1), (1, 3), (7, 1), (36, 3)])
def test_save_grid_keeps_every_pixel(n, channels, tmp_path):
    x = pictures(n, channels, 8, 10)
    grid = torch.tensor(to_grid(x))
    with Image.open(save_grid(x, tmp_path / "grid.png", scale=3)) as image:
        assert image.size == (3 * grid.shape[1], 3 * grid.shape[0])
        saved = torch.tensor(list(image.convert("RGB").getdata())).reshape(*image.size[::-1], 3)
    assert (saved[1::3, 1::3] / 255 - grid).abs().max() <= .51 / 255


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n_frames", [1, 2, 12])
def test_save_gif_has_every_frame_and_rests_on_the_last(n_frames, channels, tmp_path):
    frames = [pictures(4, channels, 8, 8) * (k + 1) / n_frames for k in range(n_frames)]
    with Image.open(save_gif(frames, tmp_path / "film.gif", ms=100)) as gif:
        assert (gif.n_frames, gif.info["loop"] if n_frames > 1 else 0) == (n_frames, 0)
        durations = []
        for k in range(n_frames):
            gif.seek(k)
            durations.append(gif.info.get("duration"))
    if n_frames > 1: assert durations == [100] * (n_frames - 1) + [400]


def test_the_animation_of_a_board_ends_with_the_newest_samples(tmp_path):
    board = Board()
    for epoch in range(90): board.update(record(epoch + 1))
    with Image.open(board.save_gif(tmp_path / "film.gif", ncol=3, scale=1)) as gif:
        assert gif.n_frames == len(board.history.frames | board.history.last) == 24
        gif.seek(gif.n_frames - 1)
        last = torch.tensor(list(gif.convert("RGB").getdata())).reshape(*gif.size[::-1], 3) / 255
    assert (last - torch.tensor(to_grid(record(90)["samples"], 3))).abs().max() < .02


def test_no_samples_make_no_animation(tmp_path):
    board = Board()
    board.update({"epoch": 1})
    with pytest.raises(ValueError, match="record 'samples' first"): board.save_gif(tmp_path / "film.gif")
    assert not list(tmp_path.iterdir())


# --- plots and TensorBoard -------------------------------------------------------------------------------------------------
def axes():
    from matplotlib.figure import Figure
    return Figure().subplots()


@pytest.mark.parametrize("steps, n, channels", [(1, 1, 1), (5, 6, 3), (12, 2, 1)])
def test_denoising_strip_has_a_row_a_picture_and_a_column_a_step(steps, n, channels):
    x0s = pictures(steps, n, channels, 8, 8)
    ax = denoising_strip(x0s, torch.arange(steps), axes())
    grid = to_grid(torch.cat([x0s[:, k] for k in range(n)]), steps)
    assert (ax.images[0].get_array().data == grid).all()
    assert [text.get_text() for text in ax.texts] == [str(k) for k in range(steps)]


def test_reward_histogram_counts_finite_rewards_in_equal_bins():
    ax = reward_histogram(torch.zeros(10), torch.tensor([1., 1, 2, math.inf, math.nan, -math.inf]), axes())
    assert ax.get_title() == "The mean reward went from 0.00 to 1.33"
    outlines = {patch.get_label(): patch.get_xy() for patch in ax.patches}
    assert {name: xy[:, 1].max() for name, xy in outlines.items()} == {"before": 10, "now": 2}
    assert set(outlines["before"][:, 0]) == set(outlines["now"][:, 0])


def test_log_record_reads_back_from_tensorboard_files(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter
    x = pictures(5, 3, 8, 8)
    with SummaryWriter(tmp_path) as writer:
        for step in 0, 3:
            log_record(writer, {"epoch": step, "reward": 1. + step, "n": 7, "fd": None if step else 2., "kl": math.nan, "note": "text",
                                "samples": x, "rewards": torch.tensor([1., 2., math.inf, math.nan])}, "finetune/")
        log_record(writer, {"step": 9, "loss": .5, "samples": None, "rewards": None})
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    values = lambda name: [(o.step, o.value) for o in events.Scalars(name)]
    assert sorted(events.Tags()["scalars"]) == ["finetune/fd", "finetune/kl", "finetune/n", "finetune/reward", "loss"]
    assert values("finetune/reward") == [(0, 1), (3, 4)] and values("finetune/fd") == [(0, 2)] and values("loss") == [(9, .5)]
    assert all(math.isnan(value) for _, value in values("finetune/kl"))
    assert [(o.step, o.width, o.height) for o in events.Images("finetune/samples")] == [(0, 26, 17), (3, 26, 17)]
    assert [(o.step, o.histogram_value.num) for o in events.Histograms("finetune/rewards")] == [(0, 2), (3, 2)]


def test_grid_of_one_picture_is_that_picture():
    x = torch.rand(1, 1, 8, 8) * 2 - 1
    assert torch.allclose(torch.tensor(to_grid(x))[..., 0] * 2 - 1, x[0, 0], atol=1e-6)
    assert to_grid(torch.zeros(4, 3, 8, 8)).shape == (17, 17, 3)
