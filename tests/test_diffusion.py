"""Schedule, samplers, guidance, timesteps, and the loop that ties them together: no network, no weights.

Three kinds of reference: golden/ (what the authors' code and diffusers compute, see golden/README.md), closed
forms, and diffusers itself for DPM-Solver++, which neither peer's pipeline has. A number of tests pin down what
other implementations get wrong; their docstrings say what happens there.
"""
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from extras.editing import InpaintMask, cut_levels
from helpers import HostReads, Launches, golden, rel
from training.losses import p2_weight, v_weight
from wuerstchen import (SAMPLERS, Sampling, add_noise, alphas_cumprod, check_finite, ddim_step, ddpm_step, denoise,
                        dpm_solver_step, guide, per_row, predict_x_0)

ALL_SAMPLERS = [*SAMPLERS.values(), partial(ddim_step, eta=0.5)]
SAMPLER_NAMES = [*SAMPLERS, "ddim, eta 0.5"]
each_sampler = pytest.mark.parametrize("step", ALL_SAMPLERS, ids=SAMPLER_NAMES)


@pytest.fixture(scope="module")
def schedule() -> dict[str, Tensor]:
    return golden("scheduler")[0]


def recorded(noises: Tensor):
    """A `draw` that gives recorded noise, and fails where more is drawn than was recorded."""
    return iter(noises).__next__


def half(x: Tensor, t: Tensor, both: bool) -> Tensor:
    """Half of x is said to be noise; without the text, all of it."""
    return torch.cat([0.5 * x, x]) if both else 0.5 * x


def noise_like(x: Tensor):
    return lambda: torch.randn(x.shape)


def even(steps: int, t_start: float = 1.0, t_end: float = 0.0) -> Tensor:
    return Sampling(steps, t_start=t_start, t_end=t_end).levels


# Data for which the best possible network is known: four independent Gaussians, (1, 4) each.
MEAN, STD = torch.tensor([[-1.0, 0.5, 2.0, 0.0]]), torch.tensor([[0.5, 1.5, 0.3, 0.1]])


def best_eps(x: Tensor, t: Tensor, both: bool = False) -> Tensor:
    """The mean of eps given x_t for that data: the covariance of eps and x_t over the variance of x_t, times x_t less
    its mean."""
    ab = per_row(alphas_cumprod(t), x)
    return (1 - ab).sqrt() * (x - ab.sqrt() * MEAN) / (ab * STD ** 2 + 1 - ab)


def exact_path(t: float) -> Tensor:
    """Where infinitely many DDIM steps lead: each coordinate stays equally many standard deviations from its mean."""
    ab = alphas_cumprod(torch.tensor(t))
    return ab.sqrt() * MEAN + (ab * STD ** 2 + 1 - ab).sqrt() * torch.tensor([[1.0, -1.0, 0.7, 1.5]])


def error(step, levels: Tensor, predict=best_eps) -> float:
    """Largest distance from the exact path at the last level, having started on it at the first."""
    x = denoise(predict, exact_path(levels[0].item()), lambda: None, Sampling(levels, step))
    return (x - exact_path(levels[-1].item())).abs().max().item()


# --- schedule ----------------------------------------------------------------------------------------

def test_alphas_cumprod_is_the_released_one(schedule):
    """Also against its formula in float64. The references' warped variants, scaler 0.5 and 2, are not
    supported, by design: no released weights use them."""
    ours = alphas_cumprod(schedule["in/grid"])
    for reference in ("alpha_cumprod", "alpha_cumprod_f64_analytic"):
        assert (ours - schedule[f"out/{reference}/s0.008_scaler1"]).abs().max() < 5e-7


def test_there_is_always_some_signal_and_some_noise():
    """The steps divide by the square roots of both. One implementation lost a factor 1/2 where the cosine is scaled to
    1 at t = 0, and has a third too little noise on the nearly clean levels: here 1 - alphas_cumprod(1/60) must be
    right."""
    ab = alphas_cumprod(torch.linspace(0, 1, 1001))
    assert (ab.diff() <= 0).all() and ab[0] == torch.tensor(0.9999) and ab[-1] == torch.tensor(0.0001)
    quarter_turn = [math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 1 / 60)]
    assert 1 - alphas_cumprod(torch.tensor(1 / 60)).item() == pytest.approx(1 - quarter_turn[1] / quarter_turn[0],
                                                                            rel=1e-3)


def test_half_precision_noise_levels_are_computed_in_float32():
    """Only t itself is rounded then; a schedule in half precision would be off by several steps near t = 1."""
    t = torch.linspace(0, 1, 30)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(alphas_cumprod(t.to(dtype)), alphas_cumprod(t.to(dtype).float()))


@pytest.mark.parametrize("t", [[500.0], [-0.1], [0.2, 1.01], [math.nan]])
def test_noise_levels_outside_0_to_1_are_refused(t):
    """Integer timesteps 0..999, the habit elsewhere, would otherwise be taken for pure noise, silently."""
    for use in (alphas_cumprod, p2_weight, v_weight, lambda t: add_noise(torch.zeros(len(t), 3), torch.zeros(len(t), 3),
                                                                         t)):
        with pytest.raises(ValueError, match=r"noise levels must lie in \[0, 1\]"):
            use(torch.tensor(t))


@pytest.mark.parametrize("k, gamma", [(1.0, 1.0), (1.0, 0.5), (2.0, 1.0)])
def test_p2_weight_is_the_released_one(schedule, k, gamma):
    assert rel(p2_weight(schedule["in/grid"], k, gamma),
               schedule[f"out/p2_weight/s0.008_scaler1_k{k}_gamma{gamma}"]) < 1e-6


def test_p2_weight_is_the_share_of_noise(schedule):
    torch.testing.assert_close(p2_weight(schedule["in/grid"]), 1 - alphas_cumprod(schedule["in/grid"]), rtol=2e-3,
                               atol=1e-7)


def test_v_weight_turns_the_error_of_eps_into_that_of_v():
    """v = sqrt(ab) eps - sqrt(1 - ab) x_0. One and the same wrong guess at x_t, said in either way, must cost the
    same."""
    t = torch.tensor([0.0, 0.3, 0.6, 0.9])
    ab = alphas_cumprod(t)[:, None]
    x_0, eps, eps_hat = torch.randn(3, 4, 8, dtype=torch.float64)
    x_0_hat = predict_x_0(add_noise(x_0, eps, t), eps_hat, t)
    v, v_hat = (ab.sqrt() * e - (1 - ab).sqrt() * x for e, x in ((eps, x_0), (eps_hat, x_0_hat)))
    torch.testing.assert_close(v_weight(t)[:, None] * (eps_hat - eps) ** 2, (v_hat - v) ** 2, rtol=1e-5, atol=0)


def test_v_weight_is_capped():
    """Uncapped it reaches 10000 at t = 1: one such row would be the whole batch's gradient."""
    for least, cap in ((0.01, 100), (0.1, 10)):
        assert v_weight(torch.tensor([1.0]), least).item() == pytest.approx(cap)


# --- noise and steps ---------------------------------------------------------------------------------

def test_add_noise_equals_both_peers(schedule):
    noisy = add_noise(schedule["in/noise/x"], schedule["in/noise/noise"], schedule["in/noise/t"])
    for peer in ("add_noise", "diffuse"):
        assert rel(noisy, schedule[f"out/noise/{peer}"]) < 1e-6


def test_predict_x_0_undoes_add_noise():
    """Up to t = 1, where a signal of 1/100 is all that is left to guess from: so 1e-4 and not 1e-6."""
    x_0, eps, t = torch.randn(5, 3, 4), torch.randn(5, 3, 4), torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    torch.testing.assert_close(predict_x_0(add_noise(x_0, eps, t), eps, t), x_0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("step, name", [(ddpm_step, "ddpm"), (ddim_step, "ddim")])
def test_one_step_with_its_own_noise_level_in_each_row(schedule, step, name):
    """diffusers takes the next level of the first row for all rows, silently; the authors' code does not, nor ours.
    The second row steps to t = 0, where no noise is added."""
    x = step(schedule["in/noise/x"], schedule["in/step/pred"], schedule["in/step/t"], schedule["in/step/t_prev"],
             schedule["in/noise/noise"])
    assert rel(x, schedule[f"out/step/original_{name}"]) < 1e-6


@pytest.mark.parametrize("levels", ["default_stage_c", "linspace12"])
@pytest.mark.parametrize("step, name", [(ddpm_step, "ddpm"), (ddim_step, "ddim_original")])
def test_trajectories_equal_the_peers_in_every_step(schedule, levels, step, name):
    data = {key.rpartition("/")[2]: value for key, value in schedule.items() if f"traj/{levels}/" in key}
    states, preds = [], iter(data["preds"])
    denoise(lambda x, t, both: 0.9 * x + 0.3 * next(preds), data["x"], recorded(data["noises"]),
            Sampling(data["timesteps"], step), callback=lambda i, t, x, x_0: states.append(x))
    assert rel(torch.stack(states), data[name]) < 1e-6


@pytest.mark.parametrize("step, name", [(ddpm_step, "ddpm"), (ddim_step, "ddim")])
def test_guided_sampling_equals_the_authors_loop(schedule, step, name):
    """Seven steps at guidance 4, conditional and unconditional prediction in one batch."""
    data = {key.rpartition("/")[2]: value for key, value in schedule.items() if "/loop/" in key}
    condition = torch.cat([data["c"], data["c_uncond"]])[..., None, None]                # (2B, 3, 1, 1)
    states = []

    def predict(x, t, both):
        assert both
        x, t = torch.cat([x, x]), torch.cat([t, t])
        mixed = torch.einsum("dc,bchw->bdhw", data["mix"], x)
        return 0.9 * x + mixed * t[:, None, None, None] + condition
    denoise(predict, data["x_init"], recorded(data["noises"]), Sampling(7, step, guidance=4.0),
            callback=lambda i, t, x, x_0: states.append(x))
    assert rel(torch.stack(states), data[name]) < 1e-6


def test_a_perfect_prediction_leads_back_to_the_data():
    """With the true noise, DDIM walks straight to x_0, in one step or in ten, but for the 1e-4 of noise left at t = 0.
    So does DPM-Solver++: its memory finds that the guess of x_0 did not change."""
    x_0, eps = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    for steps in (1, 10):
        for step in (ddim_step, dpm_solver_step):
            x = denoise(lambda x, t, both: eps, add_noise(x_0, eps, torch.ones(2)), lambda: None, Sampling(steps, step))
            torch.testing.assert_close(x, add_noise(x_0, eps, torch.zeros(2)), rtol=0, atol=1e-3)


def test_ddim_with_eta_1_is_ddpm(schedule):
    """Two formulas for one step: the same mean and the same noise, so from the same draws the same trajectory."""
    data = {key.rpartition("/")[2]: value for key, value in schedule.items() if "traj/default_stage_c/" in key}
    states, preds = [], iter(data["preds"])
    denoise(lambda x, t, both: 0.9 * x + 0.3 * next(preds), data["x"], recorded(data["noises"]),
            Sampling(data["timesteps"], partial(ddim_step, eta=1.0)), callback=lambda i, t, x, x_0: states.append(x))
    assert rel(torch.stack(states), data["ddpm"]) < 1e-5


def test_eta_says_how_much_of_the_noise_is_fresh_and_never_how_much_there_is():
    """eta 0.5 adds half of what DDPM adds, and keeps that much more of the old: the sum is what the next level has."""
    t, t_prev = torch.tensor([0.99, 0.6, 0.2]), torch.tensor([0.9, 0.5, 0.1])
    eps, zero = torch.ones(3, 1), torch.zeros(3, 1)
    all_fresh = ddpm_step(zero, zero, t, t_prev, eps)
    for eta in (0.0, 0.25, 0.5, 1.0):
        old = ddim_step(add_noise(zero, eps, t), eps, t, t_prev, zero, eta=eta)
        fresh = ddim_step(zero, zero, t, t_prev, eps, eta=eta)
        torch.testing.assert_close(fresh, eta * all_fresh, rtol=1e-5, atol=0)
        torch.testing.assert_close(old ** 2 + fresh ** 2, 1 - alphas_cumprod(t_prev)[:, None], rtol=1e-5, atol=0)


@each_sampler
def test_the_last_step_adds_no_noise(step):
    """Whatever is drawn there would stay in the image. Row by row: the second row has steps to go."""
    x, eps, t, t_prev = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([0.1, 0.5]), torch.tensor([0.0, 0.4])
    one, other = (step(x, eps, t, t_prev, torch.randn(2, 3)) for _ in range(2))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1]) == (step in (ddim_step, dpm_solver_step))


@each_sampler
@pytest.mark.parametrize("first, last", [(1.0, 0.994), (1.0, 0.98), (0.003, 0.0)])
def test_levels_among_which_the_schedule_stands_still_do_no_harm(step, first, last):
    """Above 0.9936 and below 0.0022 alphas_cumprod is clamped: a step there is none, and 0/0 is near."""
    x = torch.randn(2, 3, 4)
    found = denoise(half, x, noise_like(x), Sampling(torch.linspace(first, last, 13), step))
    assert found.isfinite().all() and found.abs().max() < 10 * x.abs().max()
    if last == 0.994:
        assert rel(found, x) < 1e-5


# --- DPM-Solver++ ------------------------------------------------------------------------------------

def test_dpm_solver_is_of_second_order_and_ddim_of_first():
    """Twice the steps: a quarter of DPM-Solver++'s error, half of DDIM's. Measured on data whose exact path is known,
    without the ends, where the steps are clamped (t = 1) or of first order on purpose (t = 0)."""
    for step, low, high in ((dpm_solver_step, 1.7, 2.5), (ddim_step, 0.8, 1.3)):
        errors = [error(step, even(n, 0.8, 0.2)) for n in (8, 16, 32, 64)]
        orders = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:])]
        assert all(low < order < high for order in orders), orders


@pytest.mark.parametrize("t_start, t_end, more", [(0.8, 0.2, 60), (0.9, 0.1, 60), (1.0, 0.0, 30)])
def test_15_steps_of_dpm_solver_beat_many_more_of_ddim(t_start, t_end, more):
    """What it is for. The whole way from 1 to 0 ends in a step of DDIM, which costs a part of the advantage."""
    assert error(dpm_solver_step,
                 even(15, t_start, t_end)) < error(ddim_step, even(more, t_start, t_end))


def test_dpm_solver_starts_and_ends_with_ddim():
    """At the start there is no memory. At the end log(signal / noise) takes its longest step, too long to be
    extrapolated over; row by row, as the second row of the second call shows, which steps to 0.4."""
    x, eps, x_0_last = torch.randn(3, 2, 4)
    t, t_prev, t_last = torch.tensor([0.1, 0.5]), torch.tensor([0.0, 0.4]), torch.tensor([0.2, 0.6])
    ddim = ddim_step(x, eps, t, t_prev)
    assert rel(dpm_solver_step(x, eps, t, t_prev), ddim) < 1e-6
    found = dpm_solver_step(x, eps, t, t_prev, last=(t_last, x_0_last))
    assert rel(found[0], ddim[0]) < 1e-6 and rel(found[1], ddim[1]) > 1e-2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")      # theirs, about numpy
def test_dpm_solver_equals_that_of_diffusers_in_every_step():
    """Its solver counts in integers over schedules of its own, but all that it computes with is sigma, noise over
    signal: given ours, it must walk our way. It too makes the last step DDIM's."""
    diffusers = pytest.importorskip("diffusers",
                                    reason="compares with diffusers, which is not installed: pip install diffusers")
    levels, states, preds = even(12), [], torch.randn(12, 2, 3, 4)
    theirs = diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint")
    theirs.set_timesteps(12)
    theirs.sigmas = ((1 - alphas_cumprod(levels)) / alphas_cumprod(levels)).sqrt()
    x = start = torch.randn(2, 3, 4)
    for i, integer in enumerate(theirs.timesteps):
        x = theirs.step(0.9 * x + 0.3 * preds[i], integer, x).prev_sample
        states.append(x)

    def compare(i, t, x, x_0):
        assert rel(x, states[i]) < 1e-5, f"step {i + 1}"
    eps = iter(preds)
    denoise(lambda x, t, both: 0.9 * x + 0.3 * next(eps), start, lambda: None, Sampling(levels, dpm_solver_step),
            callback=compare)


@pytest.mark.parametrize("first", [[0.6, 0.5999999], [0.6, 0.5999], [1.0, 0.9935]])
def test_a_tiny_step_does_not_blow_up_the_next_one_of_dpm_solver(first):
    """What changed in the last step is carried on over this one. After a step of next to nothing, what changed is the
    network's error alone, and the factor has no bound: without a limit, 1% of error in eps gave results that are off by
    100 and more."""
    levels = torch.cat([torch.tensor(first), torch.linspace(first[1], 0, 20)[1:]])
    generator = torch.Generator().manual_seed(0)

    def imprecise(x, t, both):
        return best_eps(x, t) + 0.01 * torch.randn(x.shape, generator=generator)
    assert error(dpm_solver_step, levels, imprecise) < 0.3


# --- guidance ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0, 8.0])
def test_guidance_rounds_like_the_released_samplers(schedule, scale):
    found = guide(schedule["in/cfg/cond"], schedule["in/cfg/uncond"], scale)
    assert torch.equal(found, schedule[f"out/cfg/lerp_{scale}"])


def test_guidance_is_one_number_or_falls_on_a_straight_line():
    assert [Sampling().guidance_at(t) for t in (1.0, 0.5, 0.0)] == [1, 1, 1]
    assert [Sampling(guidance=4).guidance_at(t) for t in (1.0, 0.5, 0.0)] == [4, 4, 4]
    for pair in ((8, 2), [8, 2]):
        assert [Sampling(guidance=pair).guidance_at(t) for t in (1.0, 0.5, 0.0)] == [8, 5, 2]


@pytest.mark.parametrize("alone", [(4.0,), [4.0]])
def test_a_list_of_one_scale_is_that_scale(alone):
    """A command line's `--guidance 4` arrives like that where two numbers are possible."""
    assert Sampling(guidance=alone).guidance_at(0.5) == 4


def test_outside_the_guidance_interval_nothing_is_predicted_without_text():
    """Half the work there, that is the point of it. Both ends belong to the interval."""
    calls = []

    def predict(x, t, both):
        calls.append((t[0].item(), both, len(x), len(t)))
        return half(x, t, both)
    x = torch.randn(2, 3)
    denoise(predict, x, lambda: None, Sampling(8, ddim_step, guidance=4.0, interval=(0.25, 0.75)))
    assert [t for t, *_ in calls] == [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert [both for _, both, *_ in calls] == [False, False, True, True, True, True, True, False]
    assert {rows for _, _, *rows in calls for rows in rows} == {2}


@pytest.mark.parametrize("steps", [3, 10, 30])
def test_an_end_of_the_interval_that_is_a_level_belongs_to_it(steps):
    """But for rounding: 0.8 as a float32 lies above the 0.8 that was asked for, and among 30 even levels 0.6 lies below
    it. That must not shut a level out, or the ends would belong to some intervals and not to others."""
    for k, level in enumerate(Sampling(steps).levels.tolist()):
        end = 1 - k / steps
        assert Sampling(guidance=4, interval=(0, end)).guidance_at(level) == 4, end
        assert Sampling(guidance=4, interval=(end, 1)).guidance_at(level) == 4, end


def test_guidance_acts_within_its_interval_only():
    """Between two levels it does nothing; around one, it is that step's."""
    def run(*args, **kwargs):
        return denoise(half, torch.ones(1, 3), lambda: None, Sampling(4, ddim_step, *args, **kwargs))
    plain, full = run(1.0), run(4.0)
    assert torch.equal(run(4.0, interval=(0.55, 0.7)), plain) and torch.equal(run(4.0, interval=(0, 1)), full)
    assert not torch.equal(run(4.0, interval=(0.4, 0.6)),
                           plain) and not torch.equal(run(4.0, interval=(0.4, 0.6)), full)


def test_a_pair_of_scales_is_taken_by_noise_level_and_not_by_step():
    """So a schedule with most of its steps at high noise does not move where guidance is strong."""
    levels = torch.tensor([1.0, 0.9, 0.2, 0.0])
    x = by_hand = torch.randn(2, 3)
    for t, t_prev in zip(levels, levels[1:]):
        eps = guide(0.5 * by_hand, by_hand, 2 + 6 * t.item())
        by_hand = ddim_step(by_hand, eps, t.expand(2), t_prev.expand(2))
    found = denoise(half, x, lambda: None, Sampling(levels, ddim_step, guidance=(8, 2)))
    torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-6)


def test_rescale_takes_back_what_guidance_adds_to_the_contrast():
    """Each image by its own: 1 gives it the standard deviation of its own prediction with text, 0.5 is halfway."""
    unconditional = torch.randn(3, 4, 8, 8) * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1)
    conditional = unconditional + 0.5 * torch.randn(3, 4, 8, 8)
    std, raised = (y.flatten(1).std(dim=1) for y in (conditional, guide(conditional, unconditional, 4.0)))
    assert (raised > 1.1 * std).all()
    for rescale in (0.0, 0.5, 1.0):
        found = guide(conditional, unconditional, 4.0, rescale).flatten(1).std(dim=1)
        torch.testing.assert_close(found, raised + rescale * (std - raised), rtol=1e-5, atol=0)


def test_rescale_does_not_look_at_the_neighbours_in_the_batch():
    """A standard deviation over the whole batch would make an image depend on what else was asked for."""
    conditional, unconditional = torch.randn(2, 3, 4, 8, 8) * torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1, 1)
    together = guide(conditional, unconditional, 4.0, 0.7)
    for i in range(3):
        assert rel(guide(conditional[i:i + 1], unconditional[i:i + 1], 4.0, 0.7), together[i:i + 1]) < 1e-6


def test_denoise_rescales_too():
    """With rescale 1 and predictions that differ by a factor alone, guidance is undone altogether."""
    x = torch.randn(2, 3, 8)

    def predict(x, t, both):
        return torch.cat([0.5 * x, 0.4 * x]) if both else 0.5 * x

    def run(guidance, rescale=0.0):
        return denoise(predict, x, lambda: None, Sampling(5, ddim_step, guidance, rescale=rescale))
    torch.testing.assert_close(run(4.0, rescale=1.0), run(1.0), rtol=1e-4, atol=1e-5)
    assert rel(run(4.0), run(1.0)) > 0.1


@pytest.mark.parametrize("arguments, message", [
    (dict(guidance=()),
     "guidance is (), expected a number, or two for start and end: 1 is none, 4 is usual for Stage C."),
    (dict(guidance=(4, 3, 2)), "guidance is (4, 3, 2), expected a number"),
    (dict(guidance=math.nan), "guidance is nan, expected a number"),
    (dict(guidance=(4, math.inf)), "guidance is (4, inf), expected a number"),
    (dict(interval=(0.8, 0.2)), "interval is (0.8, 0.2), expected two noise levels in [0, 1], the lower first."),
    (dict(interval=(-0.1, 0.5)), "interval is (-0.1, 0.5), expected"),
    (dict(interval=(0.5, 100)), "interval is (0.5, 100), expected"),
    (dict(interval=(math.nan, 1)), "interval is (nan, 1), expected"),
    (dict(interval=(0.5,)), "interval is (0.5,), expected"),
    (dict(rescale=-0.1), "rescale is -0.1, expected a number from 0, none, to 1."),
    (dict(rescale=1.5), "rescale is 1.5, expected"),
    (dict(rescale=math.nan), "rescale is nan, expected"),
    (dict(eta=1.5), "eta is 1.5, expected a number from 0 to 1, where 1 is ddpm's."),
    (dict(sampler="euler"), "sampler is 'euler', expected one of ddpm, ddim, dpm++."),
])
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampling(**arguments)


# --- timesteps ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [5, 12, 60])
def test_linear_timesteps_are_the_released_ones(schedule, steps):
    assert torch.equal(Sampling(steps).levels, schedule[f"out/timesteps/linspace{steps}"])


def test_default_timesteps_c_are_the_published_list(schedule):
    """DEFAULT_STAGE_C_TIMESTEPS of diffusers: 29 steps."""
    published = np.concatenate([np.linspace(1, 2 / 3, 20), np.linspace(2 / 3, 0, 11)[1:]])
    for levels in (Sampling(early=True).levels, Sampling({2 / 3: 19, 0.0: 10}).levels):
        assert torch.equal(levels, schedule["out/timesteps/default_stage_c"])
        assert torch.equal(levels, torch.tensor(published, dtype=torch.float32))
    torch.testing.assert_close(Sampling(2, early=True).levels, torch.tensor([1, 2 / 3, 0]), rtol=0, atol=1e-7)


def test_30_steps_are_the_authors_own_schedule(schedule):
    """Theirs has 20 + 10 steps, and diffusers, with 19 + 10, one less: whoever wants the authors' asks for 30, or
    writes theirs out."""
    for levels in (Sampling(30, early=True).levels, Sampling({2 / 3: 20, 0.0: 10}).levels):
        torch.testing.assert_close(levels, schedule["out/timesteps/original_two_segments_20_10"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("t_start, t_end", [(1.0, 0.0), (0.8, 0.0), (1.0, 0.3), (0.7, 0.6), (0.6, 0.1), (0.9, 2 / 3)])
def test_any_number_of_steps_falls_strictly_from_start_to_end(early, t_start, t_end):
    for n in range(1, 101):
        t = Sampling(n, t_start=t_start, t_end=t_end, early=early).levels
        assert t.dtype == torch.float32 and len(t) == n + 1 and (t.diff() < 0).all(), n
        assert t[0] == torch.tensor(t_start) and t[-1] == torch.tensor(t_end), n


@pytest.mark.parametrize("steps", [10, 20, 60])
def test_default_timesteps_c_keep_their_corner_and_their_proportion_in_a_part_of_the_schedule(steps):
    """Started at 0.8, two fifths of the noisiest third are left, and the steps must not crowd there as if it were
    whole."""
    levels = Sampling(steps, t_start=0.8, early=True).levels
    corner = (levels == torch.tensor(2 / 3)).nonzero()
    assert levels[0] == torch.tensor(0.8) and levels[-1] == 0 and (levels.diff() < 0).all() and len(corner) == 1
    assert corner.item() / steps == pytest.approx(0.4 * 19 / (0.4 * 19 + 10), abs=0.5 / steps + 1e-6)
    for part in (levels[:corner + 1], levels[corner:]):
        assert part.diff().max() - part.diff().min() < 1e-6


@pytest.mark.parametrize("t_start", [0.6666667, 0.66667, 0.667])
def test_a_start_a_hair_above_the_corner_has_no_step_to_the_corner(t_start):
    """It is 2/3 as people write it. The part above it is worth less than half a step of ten, so it gets none."""
    levels = Sampling(10, t_start=t_start, early=True).levels
    assert len(levels) == 11 and levels[0] == torch.tensor(t_start) and (levels.diff() < -0.06).all()


def test_start_and_end_move_a_number_of_steps_and_the_start_of_segments():
    even, segments = Sampling(3, t_start=0.8, t_end=0.2), Sampling({0.5: 3, 0.1: 2}, t_start=0.8)
    torch.testing.assert_close(even.levels, torch.tensor([0.8, 0.6, 0.4, 0.2]))
    torch.testing.assert_close(segments.levels, torch.tensor([0.8, 0.7, 0.6, 0.5, 0.3, 0.1]))


def test_levels_that_are_written_out_are_taken_as_they_are():
    """Also as a tensor of another precision: it becomes float32, which is what the networks embed."""
    expected = torch.tensor([0.9, 0.4, 0.1])
    for spec in ([0.9, 0.4, 0.1], (0.9, 0.4, 0.1), expected, expected.double(), np.array([0.9, 0.4, 0.1])):
        found = Sampling(spec).levels
        assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_are_refused(early, steps):
    with pytest.raises(ValueError, match=f"steps is {steps}, expected at least 1"):
        Sampling(steps, early=early)


@pytest.mark.parametrize("spec", [[1.0, 0.5, 0.5, 0.0], [0.0, 1.0], [1.0], [], [1.0, math.nan], [[1.0, 0.0]], 0.5, {},
                                  {0.5: 3, 0.7: 3},
                                  [999.0, 500.0, 0.0], [0.5, -0.1]], ids=str)
def test_timesteps_that_do_not_fall_are_refused(spec):
    """Elsewhere a repeated level stalls: its successor is looked up by value, and found to be itself."""
    with pytest.raises(ValueError, match=r"steps is .*, or at least two strictly falling noise levels in \[0, 1\]"):
        Sampling(spec)


@pytest.mark.parametrize("spec, arguments, message", [
    ({0.5: 0, 0.0: 3}, {}, "steps is {0.5: 0, 0.0: 3}, expected at least 1"),
    ("karras", {}, "steps is 'karras', expected at least 1"),
    (10, dict(t_start=0.2, t_end=0.6), "(t_start, t_end) is (0.2, 0.6), expected 1 >= first > second >= 0."),
    (10, dict(t_start=0.5, t_end=0.5), "(t_start, t_end) is (0.5, 0.5), expected"),
    (10, dict(t_start=999), "(t_start, t_end) is (999, 0.0), expected"),
    (10, dict(t_end=-0.1), "(t_start, t_end) is (1.0, -0.1), expected"),
    (10, dict(t_start=math.nan), "(t_start, t_end) is (nan, 0.0), expected"),
])
def test_impossible_timesteps_are_refused(spec, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampling(spec, **arguments)


@pytest.mark.parametrize("strength, expected", [
    (1.0, [0.9, 0.6, 0.3, 0.1]), (0.9, [0.9, 0.6, 0.3, 0.1]), (0.75, [0.75, 0.6, 0.3, 0.1]), (0.6, [0.6, 0.3, 0.1]),
    (0.2, [0.2, 0.1]), (0.1, [0.1]), (0.0, [0.1]),
])
def test_strength_cuts_off_what_lies_above_it_and_starts_exactly_there(strength, expected):
    """Above the schedule it is the whole schedule, on a level that level, and below it there is no step to take."""
    torch.testing.assert_close(cut_levels(torch.tensor([0.9, 0.6, 0.3, 0.1]), strength), torch.tensor(expected))


@pytest.mark.parametrize("steps", [10, 30, 50, 60])
def test_a_strength_that_is_a_level_but_for_rounding_adds_no_step(steps):
    """The 0.6 among 30 even steps is not the float32 nearest to 0.6: between the two would lie a step of 6e-8, a
    prediction for nothing."""
    for k in range(1, steps):
        levels = cut_levels(Sampling(steps).levels, 1 - k / steps)
        assert len(levels) == steps - k + 1 and (levels.diff() < -1e-3).all(), 1 - k / steps


@pytest.mark.parametrize("strength", [-0.1, 1.5, math.nan])
def test_impossible_strengths_are_refused(strength):
    with pytest.raises(ValueError,
                       match=f"strength is {strength:g}, expected a number from 0, nothing changes, to 1, nothing "
                                         "is kept"):
        cut_levels(Sampling(5).levels, strength)


# --- inpainting --------------------------------------------------------------------------------------

def left_half(x_0: Tensor) -> Tensor:
    """A mask of (1, 1, W): new content in the left half of every image and channel."""
    return (torch.arange(x_0.shape[-1]) < x_0.shape[-1] // 2).view(1, 1, -1)


@each_sampler
def test_what_is_known_comes_out_exactly_and_the_rest_is_new(step):
    """Exactly: not with the 1e-4 of noise that t = 0 has by the schedule."""
    known, x = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    found = denoise(half, x, noise_like(x), Sampling(6, step),
                    keep=InpaintMask(known, left_half(known), torch.randn_like(known)))
    assert torch.equal(found[..., 4:], known[..., 4:])
    assert ((found - known)[..., :4].abs() > 0).all()


@each_sampler
def test_the_network_sees_the_known_part_at_the_noise_level_of_every_step(step):
    """From the first step on, and always with the same noise: it walks to x_0 on one straight path."""
    known, x, eps = torch.randn(3, 2, 3, 8)
    seen = []

    def predict(x, t, both):
        seen.append(t[0].item())
        assert torch.equal(x[..., 4:], add_noise(known, eps, t)[..., 4:])
        assert not torch.equal(x[..., :4], add_noise(known, eps, t)[..., :4])
        return half(x, t, both)
    denoise(predict, x, noise_like(x), Sampling(5, step, guidance=4.0), keep=InpaintMask(known, left_half(known), eps))
    assert seen == Sampling(5).levels[:-1].tolist()


def test_what_is_known_has_the_last_levels_noise_where_that_is_not_0():
    """A part of the schedule hands its result on to the next part: clean pixels in a noisy image would be noise of
    their own."""
    known, x, eps = torch.randn(3, 2, 3, 8)
    found = denoise(half, x, lambda: None, Sampling(3, ddim_step, t_start=1.0, t_end=0.4),
                    keep=InpaintMask(known, left_half(known), eps))
    assert torch.equal(found[..., 4:], add_noise(known, eps, torch.full((2,), 0.4))[..., 4:])


def test_what_is_new_fits_what_is_known():
    """With a network that knows that both halves are always alike, the new half becomes the known one."""
    known, x, eps = torch.randn(3, 2, 3, 8)
    known[..., :4] = known[..., 4:]

    def predict(x, t, both):
        ab = per_row(alphas_cumprod(t), x)
        x_0 = predict_x_0(x, eps, t)[..., 4:].repeat(1, 1, 2)
        return (x - ab.sqrt() * x_0) / (1 - ab).sqrt()
    for step in SAMPLERS.values():
        found = denoise(predict, x, noise_like(x), Sampling(10, step), keep=InpaintMask(known, left_half(known), eps))
        assert rel(found, known) < 0.05


# --- the loop ----------------------------------------------------------------------------------------

def test_sampling_stays_in_float32_whatever_the_network_computes_in():
    """Noise levels too: rounded to half precision before they are embedded, as in diffusers, they are off by whole
    radians in a third of the embedding's columns."""
    for step in ALL_SAMPLERS:
        seen = []

        def predict(x, t, both):
            seen.append((x.dtype, t.dtype))
            return (0.5 * x).to(torch.bfloat16)
        x = denoise(predict, torch.randn(2, 3).bfloat16(), lambda: torch.randn(2, 3).bfloat16(),
                    Sampling(3, step, early=True))
        assert x.dtype == torch.float32 and set(seen) == {(torch.float32, torch.float32)}


def test_guidance_is_computed_in_float32():
    """Four times the difference of two float16 predictions can lie beyond what float16 holds, and is rounded where it
    does not."""
    eps = torch.tensor([[-2e4, 0.1, 1.0], [2e4, 0.2, 3.0]], dtype=torch.float16)          # with text, without
    x = denoise(lambda x, t, both: eps, torch.zeros(1, 3), lambda: None,
                Sampling(torch.tensor([0.5, 0.4]), ddim_step, guidance=4.0))
    t = torch.tensor([0.5])
    expected = ddim_step(torch.zeros(1, 3), guide(eps[:1].float(), eps[1:].float(), 4.0), t, torch.tensor([0.4]))
    assert torch.equal(x, expected) and expected.isfinite().all()


@each_sampler
@pytest.mark.parametrize("guidance", [(), (4.0,), (4.0, (0.3, 0.6))],
                         ids=["plain", "guided", "interval"])
def test_noise_is_drawn_once_in_every_step_whatever_the_sampler(step, guidance):
    """So a seed's numbers stay where they are when the sampler changes: Stage B's follow Stage C's from one generator.
    And the published pipelines draw in the last step too, where the noise is multiplied by zero."""
    drawn, watched = [], []

    def draw():
        drawn.append(len(watched))
        return torch.randn(2, 3)
    denoise(half, torch.randn(2, 3), draw, Sampling(7, step, *guidance), callback=lambda i, *_: watched.append(i))
    assert drawn == watched == list(range(7))


@each_sampler
def test_denoise_leaves_alone_what_it_was_given(step):
    """The caller's noise and image may be needed again, for the next sampler to be compared with."""
    given = x, known, eps, levels = [torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8),
                                     even(5)]
    copies = [tensor.clone() for tensor in given]
    denoise(half, x, lambda: eps, Sampling(levels, step, guidance=4.0, rescale=0.5),
            keep=InpaintMask(known, left_half(known), eps))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, copies))


@each_sampler
def test_watch_sees_every_step_with_its_guess_of_the_image(step):
    """i, the level reached, x there, and x_0 as guessed: a preview costs nothing more."""
    x_0, eps = torch.randn(2, 2, 3)
    calls, levels = [], even(4)

    def predict(x, t, both):                       # that noise which leads to x_0 from wherever the sampler went
        ab = per_row(alphas_cumprod(t), x)
        return (x - ab.sqrt() * x_0) / (1 - ab).sqrt()

    def watch(i, t, x, x_0_hat):
        calls.append((i, t, x))
        torch.testing.assert_close(x_0_hat, x_0, rtol=0, atol=1e-3)
    x = denoise(predict, add_noise(x_0, eps, torch.ones(2)), noise_like(eps), Sampling(levels, step), callback=watch)
    assert [(i, t) for i, t, _ in calls] == [(0, 0.75), (1, 0.5), (2, 0.25), (3, 0.0)]
    assert torch.equal(calls[-1][2], x)


def test_watch_may_put_another_x_in_place():
    """The next step starts from it, in float32; what it returns after the last step is the result."""
    seen = []

    def predict(x, t, both):
        seen.append(x)
        return half(x, t, both)

    def watch(i, t, x, x_0):
        return torch.full_like(x, 7, dtype=torch.float16) if i in (1, 3) else None
    x = denoise(predict, torch.randn(2, 3), lambda: None, Sampling(4, ddim_step), callback=watch)
    assert [(y == 7).all().item() for y in [*seen, x]] == [False, False, True, False, True]
    assert seen[2].dtype == x.dtype == torch.float32


def test_watch_may_stop_by_raising():
    """At once: no further prediction is paid for."""
    class Enough(Exception):
        pass

    predicted = []

    def predict(x, t, both):
        predicted.append(t)
        return half(x, t, both)

    def watch(i, t, x, x_0):
        if i == 2:
            raise Enough
    with pytest.raises(Enough):
        denoise(predict, torch.randn(2, 3), lambda: None, Sampling(7, ddim_step), callback=watch)
    assert len(predicted) == 3


def test_progress_goes_around_the_steps():
    """tqdm and the like: they wrap an iterable and ask for its length."""
    lengths = []

    def progress(steps):
        lengths.append(len(steps))
        return steps
    denoise(half, torch.randn(2, 3), lambda: None, Sampling(7, ddim_step), progress=progress)
    assert lengths == [7]


@each_sampler
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_that_overflows_is_named_in_that_very_step(step, value):
    """One pixel of one image is enough. Elsewhere the steps go on, and what comes out is black."""
    watched = []

    def predict(x, t, both):
        eps = half(x, t, both)
        if len(watched) == 2:
            eps[1, 2] = value
        return eps
    with pytest.raises(FloatingPointError, match=re.escape("step 3 of 7 (t = 0.714)")):
        denoise(predict, torch.randn(2, 3), lambda: torch.randn(2, 3), Sampling(7, step),
                callback=lambda i, *_: watched.append(i))
    assert watched == [0, 1]


# --- a GPU must not wait for its host, nor the host for it ---------------------------------------------

@each_sampler
def test_no_step_waits_for_the_numbers_of_another_device(step):
    """A GPU is fast while the host is ahead of it. Reading one number makes the host wait for all that was asked for
    before; then the GPU waits for the host. Read is once, in the end: is all of it finite? (On the meta device other
    reads would fail as well.)"""
    x = torch.empty(2, 4, 8, 8, device="meta")
    keep = InpaintMask(torch.empty_like(x), torch.empty_like(x[:1, :1], dtype=torch.bool), torch.empty_like(x))
    with HostReads() as reads:
        found = denoise(half, x, lambda: torch.empty_like(x),
                        Sampling(6, step, guidance=(4.0, 2.0), interval=(0.3, 0.8), rescale=0.5), keep=keep)
    assert found.is_meta and reads.count == 1


@each_sampler
def test_a_guided_step_launches_at_most_20_kernels_outside_the_network(step):
    """It was 84 to 131. The constants of a step are made of numbers on the CPU. Of 20 steps more, so that what is done
    once does not count; drawing, the copy of the noise and doubling x and t for guidance do."""
    x, counts = torch.empty(2, 4, 8, 8, device="meta"), []

    def predict(x, t, both):
        torch.cat([t, t])
        return torch.cat([x, x])
    for steps in (10, 30):
        with HostReads(), Launches("meta") as launches:
            denoise(predict, x, lambda: torch.empty_like(x), Sampling(steps, step, guidance=4.0))
        counts.append(len(launches.names))
    assert 200 < counts[1] - counts[0] <= 400


def test_on_a_gpu_a_network_that_overflows_is_named_in_the_end():
    """Found when all steps are done, told as if it had been found at once."""
    finite = [torch.tensor(True), torch.tensor(False), torch.tensor(False)]
    with pytest.raises(FloatingPointError, match=re.escape("step 2 of 7 (t = 0.857)")):
        check_finite(torch.stack(finite), even(7))
    check_finite(torch.stack(finite[:1]), even(7))


def test_integer_timesteps_are_refused_on_a_gpu_by_their_type():
    """Their values are not looked at there."""
    with pytest.raises(ValueError,
                       match=re.escape("noise levels must lie in [0, 1], got torch.int64: divide integer "
                                         "timesteps by their number first")):
        alphas_cumprod(torch.empty(3, dtype=torch.int64, device="meta"))
    assert alphas_cumprod(torch.empty(3, device="meta")).dtype == torch.float32
