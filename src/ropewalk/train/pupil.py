"""What is being trained: a base with its adapter (or all of it), its loss, its weights in and out of a folder."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from ropewalk.chat.template import Template
from ropewalk.config.preference import compares_with_base
from ropewalk.config.run import Run
from ropewalk.config.scoring import OUTPUTS, scored
from ropewalk.errors import ConfigError, ModelError, OutputError
from ropewalk.kernels.branching import Branching, Piece, compiles
from ropewalk.kernels.cross_entropy import IGNORED
from ropewalk.kernels.log_probs import LogProbs
from ropewalk.models.adapter_folder import verify_parts
from ropewalk.models.head import Head, output_head
from ropewalk.models.host_memory import keep_freed
from ropewalk.models.load import Scored, load_base
from ropewalk.models.lora import Adapter, LoraSpec, attach, verify_saved
from ropewalk.models.norms import lean_norms
from ropewalk.models.quantized import Share
from ropewalk.models.recompute import Way, recompute
from ropewalk.models.rotary import lean_rotary
from ropewalk.models.rounding import Rounding, attach_rounding
from ropewalk.models.score_head import ScoreHead, score_head, score_name
from ropewalk.models.sharded import digests, fill, is_sharded, local, settle, shard, whole
from ropewalk.models.streaming import Streaming, stream
from ropewalk.train.branching import BranchingModel, kept
from ropewalk.train.distributed import ALONE, World
from ropewalk.train.policy_batches import PolicyBatch
from ropewalk.train.prepare import Prepared
from ropewalk.train.sighted import Looked, Sighted

# Where an expression over names of a model that also sees speaks of its text part, which is loaded here under plain names.
TEXT_PART = re.compile(r"(?:model\\?\.)?(?:language_model|text_model)\\?\.(?:model\\?\.)?")


class Pupil:
    """A model under training."""

    def __init__(self, model: PreTrainedModel, adapter: Adapter | None, head: Head, config: Run, world: World = ALONE) -> None:
        self.model, self.adapter, self.head, self.config, self.world = model, adapter, head, config, world
        self._whole: dict[str, Tensor] | None = None  # within `whole`, every weight of a model that is sharded
        self._held: list[dict[str, str]] = []  # and the digests of what each process holds of the adapter
        self.notices = (*head.notices, *(adapter.notes if adapter is not None else ()))
        self.branching: BranchingModel | None = None
        if not is_sharded(model) and (config.by_rewards or self._attends_by_spans()):
            self._learn_to_branch()
        if config.packing and self.head.isolation == "unpacked":
            self.notices += ("this model does not keep packed samples apart, so every sample gets a row of its own after all",)
        self._layers_chosen = False
        self.sighted: Sighted | None = None  # the model with its tower, where pictures are learnt from
        self.reference: PreTrainedModel | None = None  # the base once more, where every weight is trained and compared with it
        self.rounding: Rounding | None = None
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])

    @classmethod
    def load(cls, prepared: Prepared, device: torch.device, resume: Path | None = None, world: World = ALONE) -> Pupil:
        """The base at its place, with its adapter attached; weights of the checkpoint `resume` laid over where there is one."""
        config = prepared.run
        sharded = config.sharded and world.size > 1
        full, sees = config.adapter is None, prepared.shows
        ways, streaming = _planned(prepared, device)

        # Whole weights are looked at only by DoRA, and by who trains them.
        by_parts = sharded and not (full or config.peft_use_dora or config.lora_modules_to_save)
        share = Share(world.rank, world.size) if by_parts else None

        def load(source: Path, *, trainable: bool) -> PreTrainedModel:
            torch.manual_seed(config.seed)
            made = load_base(
                source,
                dtype=_dtype(config, device),
                device=device,
                attn_implementation=config.attention or ("sdpa" if sees else "auto"),  # flash reads no mask of pictures
                experts_implementation=config.experts,
                quantize=config.quantization,
                trust_remote_code=prepared.trusted,
                trainable=trainable,
                overrides=config.overrides_of_model_config,
                random_weights=config.reinit_weights and resume is None,
                scored=scored_by(config),
                whole=sees,
                on_host=sharded or streaming is not None,
                share=share,
            )
            _fit_vocabulary(made, prepared.template.vocabulary, config)
            return made

        model = load(resume if full and resume else prepared.base, trainable=full)
        sighted = Sighted(model, prepared.lens, device) if sees and prepared.lens is not None else None
        if sighted is not None:
            model = sighted.text
        if streaming is not None:
            stream(model, streaming, device, besides=config.lora_modules_to_save or ())
        if config.tf32:
            torch.set_float32_matmul_precision("high")
        if full and config.unfrozen_parameters:
            _unfreeze(model, config.unfrozen_parameters)
        rounding = rounding_of(config)
        if rounding is not None:
            attach_rounding(model, rounding)
        if scored_by(config):
            # A classifier of transformers reads a sequence's score at its last token that is not this one.
            model.config.get_text_config().pad_token_id = prepared.template.pad_id
        find_head = score_head if scored_by(config) else output_head
        head = None if sharded else find_head(model)
        held = torch.float32 if config.peft_autocast_adapter_dtype else model.dtype
        adapter = None if full else attach(model, lora_spec(config, model), seed=config.seed, dtype=held)
        if adapter is not None and (start := resume or config.lora_model_dir):
            adapter.load(Path(start))
        lean_norms(model)
        lean_rotary(model)
        if device.type == "cpu":
            keep_freed()
        if set(ways) - {"keep"}:
            recompute(model, ways, wrap=kept)
        if sharded:
            _shard(model, adapter, config, device, world)
        model.train()
        pupil = cls(model, adapter, head or find_head(model), config, world)
        if sharded:
            pupil.notices += (_shared_out(pupil, world),)
        elif config.sharded:
            pupil.notices += ("one process holds everything: nothing is sharded; start more with --processes, or torchrun",)
        if streaming is not None:
            pupil.notices += (f"{streaming.part} wait in the host's memory, {streaming.slots} layers are at hand at a time",)
        if sighted is not None:
            pupil.see(sighted)
        if rounding is not None:
            pupil.rounding = rounding
            pupil.notices += (
                f"{rounding.layers} linear layers round to {rounding.weights} while training, and the result is saved in plain numbers: "
                "quantise it to the same format afterwards",
            )
        if full and compares_with_base(config):
            pupil.reference = load(prepared.base, trainable=False)
            pupil.notices += ("the base is held a second time, unchanged, to compare with; an adapter needs no second one",)
        return pupil

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Every parameter that learns, by name, in a fixed order."""
        if self.adapter is not None:
            return list(self.adapter.named_parameters().items())
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def choose_layers(self, step: int) -> None:
        """LISA (arXiv 2403.17919): of the decoder layers only a few learn, drawn anew every `lisa_step_interval` steps.

        Training for quantisation begins to round at its step.
        """
        config = self.config
        if self.rounding is not None and config.qat is not None:
            self.rounding.on = step >= (config.qat.fake_quant_after_n_steps or 0)
        if config.lisa_n_layers is None or (step % config.lisa_step_interval and self._layers_chosen):
            return
        layers = self.model.get_submodule(config.lisa_layers_attribute)
        drawn = random.Random(f"{config.seed}:{step // config.lisa_step_interval}")
        awake = set(drawn.sample(range(len(layers)), min(config.lisa_n_layers, len(layers))))
        for number, layer in enumerate(layers):
            layer.requires_grad_(number in awake)
        self._layers_chosen = True

    def see(self, sighted: Sighted) -> None:
        """From now on the whole model reads, of which this is the text part."""
        self.sighted = sighted
        sighted.train(True)
        self.notices += (f"{sighted.frozen:,} parameters beside the text part, the tower that sees among them, stay frozen",)
        if (self.config.packing or self.config.eval_packing) and not sighted.try_packing(self.head):
            self.notices += ("this model does not keep packed rows with pictures apart, so every row gets a line of its own",)

    def loss(self, ids: Tensor, labels: Tensor, position_ids: Tensor, looked: Looked | None = None) -> Tensor:
        """Summed loss over the trained tokens of a batch; ids, labels and position_ids are [B, T], and the last is on the host."""
        if self.sighted is not None and looked is not None:
            return self.sighted.loss(self.head, ids, labels, position_ids.to(ids.device), looked)
        ids, labels, position_ids, attending = self._in_one_row(ids, labels, position_ids)
        with attending:
            loss, _ = self.head.loss(self.model, ids, labels, position_ids)
        return loss

    def log_probs(self, ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
        """log p of every trained token given those before it, [B, T]; 0 where nothing is trained."""
        shape = ids.shape
        ids, labels, position_ids, attending = self._in_one_row(ids, labels, position_ids)
        with attending:
            return self.head.log_probs(self.model, ids, labels, position_ids).view(shape)

    def base_log_probs(self, ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
        """The same of the base, which is this model with its adapter switched off, or else held beside it; constant."""
        with self.quietly(), nullcontext() if self.adapter is None else self.adapter.enabled(False):
            base = self.model if self.adapter is not None else self.reference
            assert base is not None, "without an adapter there is no base to compare with"
            shape = ids.shape
            ids, labels, position_ids, attending = self._in_one_row(ids, labels, position_ids, base)
            with attending:
                return self.head.log_probs(base, ids, labels, position_ids).view(shape)

    def policy_log_probs(self, batch: PolicyBatch, temperature: float) -> Tensor:
        """log p of every sampled token at the temperature it was sampled at, [T]; 0 where nothing was sampled."""
        return self._of_policy(batch, temperature, entropy=False).of_labels

    def policy_log_probs_with_entropy(self, batch: PolicyBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """The same, and the entropy in nats of what each was drawn from, [T], which is constant."""
        found = self._of_policy(batch, temperature, entropy=True)
        assert found.entropy is not None
        return found.of_labels, found.entropy

    def base_policy_log_probs(self, batch: PolicyBatch, temperature: float) -> Tensor:
        """The same of the base, which is this model with its adapter switched off, or else held beside it; constant."""
        with self.quietly(), nullcontext() if self.adapter is None else self.adapter.enabled(False):
            base = self.model if self.adapter is not None else self.reference
            assert base is not None, "without an adapter there is no base to compare with"
            return self._of_policy(batch, temperature, entropy=False, model=base).of_labels

    def _of_policy(
        self, batch: PolicyBatch, temperature: float, *, entropy: bool, model: PreTrainedModel | None = None
    ) -> LogProbs:
        model = model or self.model
        ids, labels, positions = (torch.from_numpy(a).to(model.device) for a in (batch.ids, batch.labels, batch.position_ids))
        with self._attending(batch, model):
            found = self.head.log_probs_at(model, ids, labels, positions, temperature=temperature, entropy=entropy)
        return LogProbs(found.of_labels.flatten(), None if found.entropy is None else found.entropy.flatten())

    @property
    def shares_prompts(self) -> bool:
        """Whether policy batches may be laid out with shared prompts."""
        return self.branching is not None and self.config.alora_invocation_tokens is None

    def _learn_to_branch(self) -> None:
        branching = BranchingModel(self.model, self.head)
        reason = branching.reason
        if not reason:
            self.branching = branching
            if _spans_pay(self.model.device):
                self.head = branching.head
            if self.config.alora_invocation_tokens is not None:
                reason = "where an activated adapter begins is sought from the beginning of the prompt on"
        if reason and self.config.by_rewards:
            self.notices += (f"every answer is trained on together with a prompt of its own, since {reason}",)

    def _attending(self, batch: PolicyBatch, model: PreTrainedModel) -> AbstractContextManager[Any]:
        """The attention for a batch: one that knows its pieces, or, where that is no better, the model's own."""
        if batch.shared is not None:
            assert self.branching is not None, "shared prompts for a model that was not found to read them"
            pieces = batch.shared.pieces
        else:
            return self._apart(batch.position_ids[0] == 0, model)
        return self.branching.row(Branching(pieces, batch.ids.shape[1], model.device), model)

    def _apart(self, starts: NDArray[np.bool_], model: PreTrainedModel) -> AbstractContextManager[Any]:
        """The attention for a row of samples that begin at these tokens [T]."""
        # A mask over the whole row costs more the longer the row is; without one, and without windows, the model's own is as good.
        if self.branching is None or self.head.isolation != "positions" or not _spans_pay(model.device):
            return nullcontext()
        window = self.branching.window
        if int(starts.sum()) == 1 and not 0 < window < len(starts):
            return nullcontext()
        branches = np.diff([*np.flatnonzero(starts), len(starts)]).tolist()
        return self.branching.row(Branching((Piece(0, tuple(branches)),), len(starts), model.device), model)

    def _attends_by_spans(self) -> bool:
        """Whether rows are worth another attention than the model's own, which holds a mask against the whole of them."""
        own = self.config.attention or type(self.head) is not Head or self.head.isolation == "one row"
        if own or not _spans_pay(self.model.device):
            return False
        return self.config.packing or slides_within(self.model, self.config.sequence_len)

    def _in_one_row(
        self, ids: Tensor, labels: Tensor, position_ids: Tensor, model: PreTrainedModel | None = None
    ) -> tuple[Tensor, Tensor, Tensor, AbstractContextManager[Any]]:
        """Packed rows [B, T] as one [1, B*T], and the attention that keeps its samples apart; as they are, where that is no better."""
        apart = self.branching is not None and (self.config.packing or 0 < self.branching.window < ids.shape[1])
        if not apart or self.head.isolation != "positions" or not _spans_pay(ids.device):
            return ids, labels, position_ids.to(ids.device), nullcontext()
        starts = position_ids == 0  # on the host, so that nothing waits for the device
        starts[:, 0] = True
        attending = self._apart(starts.flatten().numpy(), model or self.model)
        labels = torch.cat([torch.full_like(labels[:, :1], IGNORED), labels[:, 1:]], dim=1)  # no row goes on from another
        return ids.reshape(1, -1), labels.reshape(1, -1), position_ids.reshape(1, -1).to(ids.device), attending

    def scores(self, ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
        """[N, L]: what a model that scores gives at the tokens that have a label, in their order; all [B, T]."""
        assert isinstance(self.head, ScoreHead), "this model writes text"
        return self.head.scores(self.model, ids, labels, position_ids)

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Within it nothing is dropped out and no gradient is kept; after it the model is in the mode it was in."""
        training, whole = self.model.training, self.sighted or self.model
        whole.train(False)
        try:
            with torch.no_grad():
                yield
        finally:
            whole.train(training)

    @contextmanager
    def whole(self, *, digested: bool = False) -> Iterator[None]:
        """Within it the leading process can save; entered by all of them together, since each may hold a part only."""
        if not is_sharded(self.model):
            yield
            return
        settle(self.model)
        named: dict[str, Tensor] = dict(self.trainable()) if self.adapter is not None else self._untied()
        found = {name: whole(tensor, keep=self.world.leads) for name, tensor in named.items()}
        self._held = digests(named) if digested else []
        if self.adapter is not None:
            self.adapter.gathered = found
        else:
            self._whole = found
        try:
            yield
        finally:
            self._whole, self._held = None, []
            if self.adapter is not None:
                self.adapter.gathered = None

    def _untied(self) -> dict[str, Tensor]:
        """What a model is saved as, a weight that has two names under its first."""
        second = {n for n, _ in self.model.named_parameters(remove_duplicate=False)} - {
            n for n, _ in self.model.named_parameters()
        }
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in second}

    def save_weights(self, folder: Path) -> None:
        """The trained weights into a checkpoint's folder."""
        if self.adapter is not None:
            self.adapter.save(folder)
        else:
            self.model.save_pretrained(folder, safe_serialization=True, state_dict=self._whole)

    def load_weights(self, folder: Path) -> None:
        """The trained weights of a checkpoint laid over the present ones."""
        if is_sharded(self.model):
            settle(self.model)
        if self.adapter is not None:
            self.adapter.load(folder)
            return
        saved = load_base(
            folder,
            dtype=self.model.dtype,
            device="cpu",
            attn_implementation="eager",
            experts_implementation=None,
            scored=scored_by(self.config),
        )
        if not is_sharded(self.model):
            self.model.load_state_dict(saved.state_dict())
            return
        here = self.model.state_dict()
        for name, tensor in saved.state_dict().items():
            fill(here[name], tensor)

    def save_result(self, folder: Path, template: Template, probe: Tensor) -> None:
        """The result, whole or not at all, with its tokenizer; an adapter is read back through PEFT and must give the same logits.

        One that is sharded is read back and must hold what each process has of it.
        """
        temporary = folder.with_name(f".writing-{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            self.save_weights(temporary)
            template.save(temporary)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OutputError(f"could not write {folder}: {error}; free disk space, then run the same command again") from error
        if self.adapter is not None and is_sharded(self.model):
            verify_parts(self.adapter, temporary, self._held)
        elif self.adapter is not None:
            self.model.eval()
            verify_saved(self.adapter, temporary, probe)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)


def _spans_pay(device: torch.device) -> bool:
    """Where attention by spans runs in kernels that hold no scores: torch's for the CPU, and FlexAttention where it is compiled."""
    return device.type == "cpu" or (device.type == "cuda" and compiles())


def slides_within(model: PreTrainedModel, length: int) -> bool:
    """Whether a layer's window is shorter than a row."""
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    return window is not None and 0 < window < length and (types is None or "sliding_attention" in types)


def rounding_of(config: Run) -> Rounding | None:
    """What linear layers round to while they are trained."""
    if config.use_onebitllms:
        return Rounding("ternary", "int8 symmetric", 1)
    if config.qat is None:
        return None
    return Rounding(config.qat.weight_dtype, config.qat.activation_dtype, config.qat.group_size or 32)


def scored_by(config: Run) -> Scored | None:
    """What the run's model scores, where it is no model that writes."""
    kind = scored(config)
    return None if kind is None else Scored(tokens=kind == "steps", outputs=OUTPUTS[kind])


def lora_spec(config: Run, model: nn.Module) -> LoraSpec:
    """What the adapter covers and how, from the run's keys; a layer that scores is new, and trained whole."""
    scoring = (score_name(model),) if scored(config) else ()
    modules = config.lora_target_modules
    if isinstance(modules, str) and (plain := TEXT_PART.sub("model.", modules)) != modules:
        modules = f"(?:{modules})|(?:{plain})"
    return LoraSpec(
        r=config.rank,
        alpha=config.alpha,
        dropout=config.lora_dropout,
        target_modules=modules if isinstance(modules, str) else tuple(modules or ()),
        target_parameters=tuple(config.lora_target_parameters or ()),
        target_linear=config.targets_linear,
        experts=config.adapts_experts,
        rank_pattern=dict(config.lora_rank_pattern or {}),
        alpha_pattern=dict(config.lora_alpha_pattern or {}),
        rslora=config.peft_use_rslora,
        dora=config.peft_use_dora,
        layers_to_transform=config.peft_layers_to_transform,
        modules_to_save=tuple(dict.fromkeys([*(config.lora_modules_to_save or ()), *scoring])),
        alora_invocation_tokens=config.alora_invocation_tokens,
    )


def _shard(model: PreTrainedModel, adapter: Adapter | None, config: Run, device: torch.device, world: World) -> None:
    """Every process keeps its part of the model; modules that are trained whole stay so, with the base's own that they stand for."""
    if config.dp_shard_size not in (None, 1, world.size):
        raise ConfigError(
            f"dp_shard_size: {config.dp_shard_size}, and {world.size} processes were started; write {world.size}, or start so many"
        )
    if compares_with_base(config) and adapter is None:
        raise ConfigError(
            f"rl: {config.rl} without an adapter compares with a second copy of the base, which is not sharded; write adapter: lora, "
            "whose base is the model with the adapter switched off, or remove the keys of fsdp"
        )
    kept_whole = [] if adapter is None else [*adapter.trained.values(), *adapter.wholes.values()]
    asked = config.fsdp_config
    apart = [parameter for those in kept_whole for parameter in those.values()]
    shard(model, device, apart=apart, reshard=config.reshards, offload=asked is not None and asked.offload_params)
    if adapter is not None:
        adapter.put = fill
        adapter.watch()


def _shared_out(pupil: Pupil, world: World) -> str:
    """What this process holds of the model, in words; a model whose passes depend on its samples cannot be gone through in step."""
    if pupil.head.isolation == "unpacked":
        raise ModelError(
            f"a {type(pupil.model).__name__.removeprefix('FSDP')} keeps a state over its tokens, so that the number of its passes depends on "
            "the rows, which differ from process to process; remove the keys of fsdp, and every process holds the whole model"
        )
    settle(pupil.model)
    held = sum(local(p).nbytes for p in pupil.model.parameters())
    all_of_it = sum(p.numel() * p.element_size() for p in pupil.model.parameters())
    return f"sharded over {world.size} processes: {held / 1e9:.2f} GB of {all_of_it / 1e9:.2f} GB of weights in each"


def _dtype(config: Run, device: torch.device) -> str:
    """bfloat16 where asked for, or where nothing is said and the device computes it fast; float32 otherwise."""
    if config.dtype_name != "auto":
        return config.dtype_name
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def _fit_vocabulary(model: PreTrainedModel, tokens: int, config: Run) -> None:
    """Adds rows for tokens that the config added; they must be trained, so an adapter has to hold the embeddings whole."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    if tokens <= rows:
        return
    if config.adapter and not config.lora_modules_to_save:
        raise ConfigError(
            f"the tokenizer has {tokens} tokens and the base {rows} rows: new tokens can only be learnt if "
            "`lora_modules_to_save: [embed_tokens, lm_head]` trains the embeddings whole"
        )
    model.resize_token_embeddings(tokens, mean_resizing=False)


def _unfreeze(model: PreTrainedModel, patterns: tuple[str, ...]) -> None:
    names = [name for name, _ in model.named_parameters()]
    wanted = {name for name in names if any(re.match(pattern, name) for pattern in patterns)}
    if not wanted:
        raise ModelError(f"unfrozen_parameters {list(patterns)} match none of {len(names)} parameters, such as {names[0]}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)


def _planned(prepared: Prepared, device: torch.device) -> tuple[tuple[Way, ...] | Way, Streaming | None]:
    """What each layer keeps and what is streamed, chosen before anything is loaded; a run that cannot fit on its GPU ends here."""
    config = prepared.run
    if device.type == "cuda" and config.gpu_memory_limit is not None:
        share = config.gpu_memory_limit * 1e9 / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    asked = config.weights_on_host
    if config.recompute != "auto" and device.type != "cuda":
        return config.recompute, Streaming(asked) if asked in ("experts", "layers") else None
    from ropewalk.train.survey import survey  # which itself asks this module what the adapter covers

    found = survey(prepared.base, config, device)
    return found.ways, found.streaming
