"""Keys that trade memory, and what they cannot go together with."""

import pytest

from ropewalk.config.run import parse_run
from ropewalk.errors import ConfigError

RUN = "base_model: b\nlearning_rate: 1e-3\ndatasets: [{path: rows.jsonl, type: chat_template}]\n"


def run_of(more):
    return parse_run(RUN + more)


def test_4_bits_are_nf4_unless_int4_is_asked_for():
    assert run_of("adapter: qlora\n").quantization == "nf4"
    assert run_of("adapter: lora\nload_in_4bit: true\nbnb_4bit_quant_type: nf4\n").quantization == "nf4"
    assert run_of("adapter: qlora\nbnb_4bit_quant_type: int4\n").quantization == "int4"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("adapter: lora\nbnb_4bit_quant_type: int4\n", "is about a 4-bit base; write adapter: qlora or load_in_4bit: true"),
        ("adapter: lora\nload_in_8bit: true\nbnb_4bit_quant_type: nf4\n", "is about a 4-bit base"),
        ("adapter: qlora\nbnb_4bit_quant_type: fp4\n", "nf4"),
        ("adapter: qlora\nbnb_config_kwargs: {bnb_4bit_quant_type: fp4}\n", "nf4 or int4 here, not fp4"),
        ("adapter: qlora\nbnb_config_kwargs: {bnb_4bit_quant_type: int4}\n", "write bnb_4bit_quant_type by itself"),
        ("peft_autocast_adapter_dtype: false\n", "no adapter to keep in 16 bits"),
        ("adapter: lora\noptimizer: sgd\nfloat32_master: true\n", "kept by AdamW, not by sgd"),
        ("adapter: lora\nfsdp_version: 2\nfloat32_master: true\n", "not kept of sharded weights"),
        ("adapter: lora\nstep_in_backward: true\n", "so that max_grad_norm 1 cannot be kept; write max_grad_norm: 0"),
        ("adapter: lora\nstep_in_backward: true\nmax_grad_norm: 0.5\n", "max_grad_norm 0.5 cannot be kept"),
        ("adapter: lora\nstep_in_backward: true\nmax_grad_norm: 0\ngradient_accumulation_steps: 2\n", "makes 2; write 1"),
        ("adapter: lora\nstep_in_backward: true\nmax_grad_norm: 0\nbatch_size: 4\n", "makes 4; write 1"),
        ("adapter: lora\nstep_in_backward: true\nmax_grad_norm: 0\nfsdp_version: 2\n", "for one process"),
        (
            "adapter: lora\nstep_in_backward: true\nmax_grad_norm: 0\nrl: grpo\ntrl: {reward_funcs: [a.b]}\n",
            "over several passes",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_way_out(more, said):
    with pytest.raises(ConfigError) as refused:
        run_of(more)
    assert said in str(refused.value)


def test_what_fits_together_is_taken():
    run = run_of(
        "adapter: lora\noptimizer: adamw_8bit\nstep_in_backward: true\nmax_grad_norm: 0\nfloat32_master: true\nbf16: true\n"
    )
    assert run.step_in_backward
    assert run.float32_master
    assert run_of("adapter: lora\npeft_autocast_adapter_dtype: false\n").peft_autocast_adapter_dtype is False
