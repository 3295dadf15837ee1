"""The classifier is fitted to what its inputs have become, as the float network's own would be read."""

import pytest
import torch
from torch.nn import functional as F

from calibquant.model.quant_layer import QuantLinear
from calibquant.quantization.fake_quant import QuantizerConfig, Role
from calibquant.quantization.state import full_precision
from calibquant.solver import match
from calibquant.solver.learn import reconstruction_loss
from calibquant.solver.match import match_inputs
from calibquant.solver.peers import Peers
from calibquant.solver.pipeline import recon_settings
from calibquant.solver.recon import reconstruct
from tests.small import calibrated_model, random_float_model, small_config

IMAGES = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def linear_layer(seed: int = 0) -> QuantLinear:
    """Six inputs, four outputs, 8 bits, its range set."""
    torch.manual_seed(seed)
    quantizer = QuantizerConfig("AdaRoundFakeQuantize", "MSEObserver", 8, False, 0).build(Role.WEIGHT)
    layer = QuantLinear(torch.nn.Linear(6, 4), quantizer)
    layer.calibrate_weight()
    return layer


def test_each_input_of_a_linear_layer_counts_as_in_the_float_network():
    layer, full = linear_layer(), torch.randn(500, 6) * torch.tensor([1.0, 2, 3, 4, 5, 6]) + 1
    expected = F.linear(full, layer.weight, layer.bias)
    match_inputs(layer, full, 0.8 * full + torch.linspace(-1, 1, 6), Peers())
    found = layer(0.8 * full + torch.linspace(-1, 1, 6))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_noise_in_its_inputs_does_not_make_a_classifier_less_sure():
    layer, full = linear_layer(), torch.randn(20_000, 6)
    expected = F.linear(full, layer.weight, layer.bias)
    noisy = 0.8 * full + 0.5 * torch.randn(20_000, 6)
    match_inputs(layer, full, noisy, Peers())
    still, wanted = (torch.linalg.lstsq(full, y - y.mean(0)).solution for y in (layer(noisy), expected))
    torch.testing.assert_close(still, wanted, rtol=0, atol=0.03)  # what each float input counts for


def test_inputs_that_never_change_are_matched_in_their_mean():
    layer, full = linear_layer(), torch.ones(50, 6)
    expected = F.linear(full, layer.weight, layer.bias)
    match_inputs(layer, full, torch.zeros(50, 6), Peers())
    torch.testing.assert_close(layer(torch.zeros(50, 6)), expected[:50])


def test_inputs_that_are_the_same_in_both_networks_stay_as_they_are():
    layer = linear_layer()
    widths, means = torch.tensor([1.0, 1, 1, 1e-4, 1, 0]), torch.tensor([0.0, 1, 9, 0, 3, 3])
    varying = torch.randn(50, 6) * widths + means
    for full in (varying, varying[:1]):
        before = layer.weight.clone()
        match_inputs(layer, full, full, Peers())
        torch.testing.assert_close(layer.weight, before, rtol=1e-3, atol=0)


def reconstructed(**recon):
    changes = {f"quant__recon__{key}": value for key, value in recon.items()}
    config = small_config(**{"quant__recon__compensate": True} | changes)
    model = calibrated_model(config, IMAGES)
    return model, list(reconstruct(model, IMAGES, recon_settings(config), seed=1))


@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_a_classifier_is_matched_as_both_networks_see_what_is_learned_from(monkeypatch, held_out):
    """Against each network run whole on the images and their views, the quantized one as it ends."""
    model, ((full, quantized),) = captured_features(monkeypatch, cache="fp32", views=2, held_out=held_out)
    learned = IMAGES[[0, 1, 3, 4]] if held_out else IMAGES
    views = torch.cat([learned, learned.flip(3)])
    read = []
    model.classifier.fc.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    before = calibrated_model(small_config(), IMAGES)
    before.classifier.fc.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad(), full_precision(before):
        before(views)
        model(views)
    torch.testing.assert_close(full, read[0])
    torch.testing.assert_close(quantized, read[1])
    assert not torch.equal(full, quantized)


def captured_features(monkeypatch, **recon):
    """What the classifier's layer reads, as matching gets it: in the float and in the quantized network."""
    found = []
    original = match.match_inputs
    monkeypatch.setattr(match, "match_inputs", lambda *args: (found.append(args[1:3]), original(*args)))
    model, _ = reconstructed(**recon)
    return model, found


@pytest.mark.parametrize("recon", [{"compensate": False}, {"merge": ["classifier"]}])
def test_without_compensation_or_a_classifier_of_its_own_nothing_is_matched(monkeypatch, recon):
    _, found = captured_features(monkeypatch, **recon)
    assert not found


def test_the_classifier_learns_to_be_the_matched_one():
    """At 8 bits little is lost of that, whatever the network before has lost."""
    model, results = reconstructed()
    with torch.no_grad():
        lost = reconstruction_loss(model(IMAGES), random_float_model(small_config())(IMAGES))
    assert results[-1].error_after < 0.01 * float(lost)
