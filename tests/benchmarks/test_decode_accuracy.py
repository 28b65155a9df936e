import importlib.util

import decode_accuracy
import decode_model
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkern import benchmarking, decode


def test_divergence():
    exact = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    logits = np.log(np.array([[0.25, 0.25, 0.5], [0.1, 0.1, 0.8]])) + 3
    wanted = [0.5 * np.log(2) + 0.25 * np.log(0.5), 0]
    np.testing.assert_allclose(decode_accuracy.divergence(exact, logits), wanted, atol=1e-6)


def test_decoded():
    """Closer to float32 than the forward pass in bfloat16, and far from another model."""
    config = decode_model.CONFIGS["llama"]
    arrays = decode_model.random_arrays(config)
    packed = decode.pack_weights(decode_model.model_of(config, arrays))
    tokens = np.random.default_rng(0).integers(config.vocabulary, size=(2, 20), dtype=np.int32)
    exact, rounded, other = (
        decode_model.forward(config, weights, jnp.asarray(tokens), dtype)
        for weights, dtype in (
            (arrays, "float32"),
            (arrays, "bfloat16"),
            (decode_model.random_arrays(config, seed=1), "float32"),
        )
    )
    found = decode_accuracy.decoded(packed, tokens, np.asarray(exact))
    assert 0 < found < float(decode_accuracy.divergence(exact, rounded).mean()) < 1e-3
    assert decode_accuracy.decoded(packed, tokens, np.asarray(other)) > 0.1


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
    reason="transformers is not installed",
)
def test_rows(tmp_path):
    arguments = ["--model", "tiny", "--prompts", "2", "--length", "16", "--device", "cpu"]
    assert decode_accuracy.main([*arguments, "--output", str(tmp_path), "--commit", "abc"]) == 0
    [file] = tmp_path.glob("*.csv")
    rows = benchmarking.read_rows(file)
    values = {row.provider: row.value for row in rows}
    assert {(row.case, row.metric) for row in rows} == {
        ("decode_accuracy tiny b2 t16", "kl_divergence")
    }
    assert values["jaxkern"] < values["transformers"] < values["jaxkern fp8"] < 1e-3


def test_length_is_checked(capsys):
    with pytest.raises(SystemExit):
        decode_accuracy.main(["--model", "tiny", "--length", "129"])
    assert "--length: 129, wanted 1 to the model's 128" in capsys.readouterr().err
