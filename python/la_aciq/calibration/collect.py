"""Calibration: a model reads texts while hooks gather statistics of every linear layer's input.

What is kept is the mean of every input and one set of moments and one histogram per layer, group and language, and one
matrix of second moments per layer. Memory does not grow with the text. The model reads the text twice: the means are
known before anything else is measured, and the rest is that of the inputs less the mean of their entry.
"""

import hashlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from .. import __version__, ops
from .._files import check_output
from ..errors import LaAciqError
from ..models import EXPERT_WEIGHTS, fingerprint, is_experts, linear_weight, output_head
from ..models.architecture import check_constant_weights
from ..nn.config import is_ignored
from ..nn.first_token import cache_name
from ..nn.forward_pass import LanguageState
from ..nn.layout import LayoutDetector, detect_layouts
from ..ops import rotation
from ..ops.streaming import Moments
from ..profile.profile import JSON_FILE, Kind, Profile
from ..profile.second_moments import SecondMoments
from ..tags import SINK, UND
from .language_statistics import LanguageStatistics, ProfileBuilder
from .texts import check_ids, language_of, tokenize


def calibrate(
    model: nn.Module,
    texts: Mapping[str, Any],
    tokenizer: Any = None,
    *,
    seqlen: int = 512,
    tokens: int = 1024,
    group_size: int = 64,
    rotate: bool = True,
    seed: int = 0,
    ignore: Sequence[str] = ("lm_head",),
    second_moments: bool = True,
    center: bool = True,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
) -> Profile:
    """Measure, by language, the inputs of a model's linear layers, and the keys and values that an INT4 cache stores.

    Texts, token ids and weights are checked before the model runs.

    Args:
        model: a language model of Hugging Face transformers: a decoder, an encoder, or an encoder-decoder, whose
            decoder reads the same tokens one place later.
        texts: by BCP-47 tag a str, a list of str, or token ids (then the tokenizer may be None); see
            `calibration.tokenize`. For a model that reads something else, such as speech: by tag a list of keyword
            arguments of its calls, mappings of names to tensors with a batch of one.
        tokenizer: the model's tokenizer.
        seqlen: tokens per window, at least 2.
        tokens: how many tokens at the start of each text are read. Lists of calls are read whole.
        group_size: elements along the input that share statistics: even, or 0 for one group per token. Keys and values
            have one group per head; they are measured after the cache's own centering and rotation, in decoders.
        rotate: measure inputs after the randomized Hadamard rotation.
        seed: of the rotation's signs.
        ignore: names of linear layers to leave out: full names, last components, or shell patterns.
        second_moments: also sum x x^T over the inputs, which the rounding of weights uses. This takes 4 K^2 bytes of
            memory per input of K elements and half of that on disk, for Llama-like models about as much as their
            float32 and bfloat16 weights, and about as long as running the model.
        center: measure the mean input of every entry first, and then inputs less that mean, which
            `QuantConfig(center=True)` needs. The model then reads every text twice.
        progress: show a progress bar.
        resume: a folder to keep finished languages in. Languages that it holds, from an interrupted run, are not
            measured again, and the result is bit-identical. It can be deleted once the profile is saved.

    Returns:
        The profile.

    Raises:
        LaAciqError: a text is too short or names no language, weights or activations have NaN or infinities (the
            message names the layer), or `resume` holds a calibration with other settings, or something else.
        TypeError: a text is of another type.
    """
    if resume is not None:
        check_output(resume, JSON_FILE, force=True)
    calibration = Calibration(
        model,
        texts,
        tokenizer,
        seqlen=seqlen,
        tokens=tokens,
        group_size=group_size,
        rotate=rotate,
        seed=seed,
        ignore=ignore,
        second_moments=second_moments,
        center=center,
    )
    builder = ProfileBuilder()
    if resume is not None and (Path(resume) / JSON_FILE).exists():
        builder = calibration.continued(Path(resume))
    finished = set(builder.languages)
    order = sorted(calibration.languages, key=lambda tag: tag not in finished)
    for statistics in calibration.measured(order, progress, finished):
        builder.add(statistics)
        if resume is not None and statistics.sites:
            calibration.profile(builder).save(resume, force=True)
    return calibration.profile(builder)


class Calibration:
    """A model, and the texts it is to read by language, all of it checked: what one process does of `calibrate`.

    Its arguments are those of `calibrate`.

    Attributes:
        languages: the tags in the order of the profile's entries.
        second_moments: float32 [K, K] by site, over all languages measured here so far; None when not measured.
    """

    def __init__(
        self,
        model: nn.Module,
        texts: Mapping[str, Any],
        tokenizer: Any,
        *,
        seqlen: int,
        tokens: int,
        group_size: int,
        rotate: bool,
        seed: int,
        ignore: Sequence[str],
        second_moments: bool,
        center: bool,
    ) -> None:
        if group_size < 0 or group_size % 2:
            raise LaAciqError(f"group_size = {group_size}; expected an even number of elements, or 0 for the whole row")
        check_constant_weights(model)
        self._readings = _readings(model, texts, tokenizer, tokens=tokens, seqlen=seqlen)
        _check_weights(model)
        self._settings = {
            "fingerprint": fingerprint(model),
            "architecture": type(model).__name__,
            "rotation": {"enabled": rotate, "seed": seed},
            "group_size": group_size,
            "seqlen": seqlen,
            "ignore": list(ignore),
            "center": center,
        }
        self._device = next(model.parameters()).device
        self._collector = _Collector(model, group_size, seed if rotate else None, ignore, second_moments)
        self._center = center
        self._name = type(model).__name__
        self.languages = tuple(self._readings)
        self.second_moments = self._collector.second_moments if second_moments else None

    @property
    def metadata(self) -> dict[str, Any]:
        """That of the profile of all languages: the same for the same model, texts and settings."""
        return {
            **self._settings,
            "layouts": self._collector.layouts,
            "tokens": {tag: reading.tokens for tag, reading in self._readings.items()},
            "texts": {tag: reading.hash for tag, reading in self._readings.items()},
            "versions": {"la_aciq": __version__, "torch": torch.__version__},
        }

    def measured(
        self, tags: Sequence[str], progress: bool, finished: AbstractSet[str] = frozenset()
    ) -> Iterator[LanguageStatistics]:
        """Run the model over the texts of these languages, one after the other.

        Of finished languages, only the sums for the centers are taken again, because no file keeps them.
        """
        collector = self._collector
        total = sum(self._readings[tag].tokens for tag in tags) * (2 if self._center else 1)
        initial = sum(self._readings[tag].tokens for tag in finished)
        calls = [call for reading in self._readings.values() for call in reading.calls]
        if calls:
            collector.detect_layouts(calls[0], self._device)
        with (
            tqdm(total=total, initial=initial, unit="tok", disable=not progress) as bar,
            collector.attached({name for call in calls for name in call}) as network,
        ):

            def read(tag: str) -> None:
                for call in self._readings[tag].calls:
                    arguments = {name: value.to(self._device) for name, value in call.items()}
                    try:
                        network(**arguments, **collector.cache(network))
                    except Exception as error:
                        if isinstance(error, LaAciqError) or bar.n > initial:
                            raise
                        reason = str(error).strip().partition("\n")[0]
                        raise LaAciqError(
                            f"{self._name} cannot be calibrated: its first forward pass, with {', '.join(arguments)}, "
                            f"fails: {type(error).__name__}: {reason}"
                        ) from error
                    bar.update(_positions(call))

            for tag in tags:
                collector.begin_language()
                if self._center:
                    bar.set_description(f"centering {tag}")
                    with collector.summing():
                        read(tag)
                if tag not in finished:
                    bar.set_description(f"calibrating {tag}")
                    read(tag)
                yield collector.end_language(tag)
            bar.set_description("calibrated")

    def profile(self, builder: ProfileBuilder) -> Profile:
        """The profile of the languages in `builder`, all of them measured here."""
        matrices = None if self.second_moments is None else SecondMoments.of(self.second_moments)
        return builder.profile(self.metadata, matrices)

    def continued(self, folder: Path) -> ProfileBuilder:
        """The languages that an interrupted run with these settings left in a folder."""
        partial = Profile.load(folder)
        differing = [key for key, value in self._settings.items() if partial.metadata.get(key) != value]
        hashes = {tag: reading.hash for tag, reading in self._readings.items()}
        differing += [
            f"the text for {tag!r}" for tag in partial.languages if partial.metadata["texts"][tag] != hashes.get(tag)
        ]
        if (partial.second_moments is None) != (self.second_moments is None):
            differing.append("second_moments")
        if differing:
            raise LaAciqError(
                f"{str(folder)!r} keeps an unfinished calibration that differs in {differing[0]}; "
                "delete it, or repeat its command"
            )
        if self.second_moments is not None:
            self.second_moments.update(partial.second_moments or {})
        self._collector.known.update(partial.layers)
        return ProfileBuilder.of(partial)


@dataclass(frozen=True)
class _Reading:
    """What a model reads of a language: the arguments of its calls, the number of their tokens, and a hash."""

    calls: list[dict[str, Tensor]]
    tokens: int
    hash: str


def _readings(
    model: nn.Module, texts: Mapping[str, Any], tokenizer: Any, *, tokens: int, seqlen: int
) -> dict[str, _Reading]:
    """By canonical tag. Texts become windows; lists of calls are taken as they are."""
    calls_by_tag = {tag: text for tag, text in texts.items() if _is_calls(text)}
    if calls_by_tag and len(calls_by_tag) < len(texts):
        raise LaAciqError("texts has lists of calls for some languages and texts for others; expected one kind for all")
    if calls_by_tag:
        readings: dict[str, _Reading] = {}
        for key, calls in calls_by_tag.items():
            tag = language_of(key, "texts")
            if tag in readings:
                raise LaAciqError(f"texts has the language {tag!r} twice (as {key!r} the second time)")
            digest = hashlib.sha256()
            for name, value in [item for call in calls for item in sorted(call.items())]:
                digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            readings[tag] = _Reading([dict(call) for call in calls], sum(map(_positions, calls)), digest.hexdigest())
        return readings
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise LaAciqError(
            f"{type(model).__name__} reads {model.main_input_name}; expected for each language a list of its calls' "
            "arguments (mappings of names to tensors) instead of text"
        )
    tokenized = tokenize(texts, tokenizer)
    windows = {tag: text.windows(tag, tokens=tokens, seqlen=seqlen) for tag, text in tokenized.items()}
    if getattr(model, "get_input_embeddings", None) is None:
        raise LaAciqError(f"{type(model).__name__} is not a language model of Hugging Face transformers")
    check_ids(model, tokenized, seqlen)
    return {
        tag: _Reading(
            [_call(model, window.ids) for window in windows[tag]],
            tokens,
            hashlib.sha256(text.ids[:tokens].tobytes()).hexdigest(),
        )
        for tag, text in tokenized.items()
    }


def _is_calls(text: Any) -> bool:
    """Whether the entry of `texts` is a list of mappings of names to tensors."""
    return (
        isinstance(text, Sequence)
        and len(text) > 0
        and all(isinstance(call, Mapping) and all(isinstance(v, Tensor) for v in call.values()) for call in text)
    )


def _call(model: nn.Module, ids: NDArray[np.int64]) -> dict[str, Tensor]:
    """The arguments with which a model reads a window of token ids [t]."""
    call = {"input_ids": torch.from_numpy(ids)[None]}
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        start = _decoder_start(model, config)
        first = call["input_ids"][:, -1:] if start is None else torch.tensor([[start]])
        call["decoder_input_ids"] = torch.cat([first, call["input_ids"][:, :-1]], dim=1)
    return call


def _decoder_start(model: nn.Module, config: Any) -> int | None:
    """The id that a decoder's text begins with; None for models that begin with the text's last id, as mBART does."""
    generation: Any = getattr(model, "generation_config", None)
    start = getattr(generation, "decoder_start_token_id", None)
    if start is None and hasattr(config, "decoder_start_token_id"):
        start = config.decoder_start_token_id
    elif start is None:  # `generate` begins with it then
        start = getattr(generation, "bos_token_id", None)
    return None if start is None else int(start)


def _positions(call: Mapping[str, Tensor]) -> int:
    """The tokens of a call, those of the decoder where there are two kinds."""
    ids = [call[name] for name in ("decoder_input_ids", "input_ids") if name in call]
    return ids[0].numel() if ids else 1


class _Collector:
    """Hooks on a model's layers and the statistics they add up.

    second_moments: float32 [K, K] by site of all tokens so far. Everything else belongs to one language, between
    `begin_language` and `end_language`: its means come first, if at all. They are summed within `summing`; what is
    measured outside of it is less the mean of its entry. known: the site of each layer in any language so far.
    """

    def __init__(
        self, model: nn.Module, group_size: int, seed: int | None, ignore: Sequence[str], second_moments: bool
    ) -> None:
        self.known: dict[str, str] = {}
        self.second_moments: dict[str, NDArray[np.float32]] = {}
        self._sums_products = second_moments
        self._model = model
        self._group_size = group_size
        self._seed = seed
        head = output_head(model)
        modules = {name: module for name, module in model.named_modules() if not is_ignored(name, ignore, head)}
        self._experts = {name: module for name, module in modules.items() if is_experts(module)}
        self._linears = {
            name: module
            for name, module in modules.items()
            if isinstance(module, nn.Linear) or linear_weight(module) is not None
        }
        if not self._linears:
            raise LaAciqError(
                f"{type(model).__name__} has no linear layers (torch.nn.Linear) to calibrate outside {list(ignore)}"
            )
        for name, module in self._linears.items():
            weight = linear_weight(module)
            if weight is not None and weight.shape[1] == 0:
                raise LaAciqError(f"layer {name!r} has no input features (K = 0); leave it out with ignore")
        self._signs: dict[int, Tensor] = {}
        self._last: tuple[Tensor, str] | None = None
        # The same entries as when the quantized model runs: one place decides which tokens are first.
        self._rows = LanguageState((UND, SINK), by_language=False)
        self._summing = False
        self.layouts: dict[str, str | None] = {}
        self.begin_language()

    def begin_language(self) -> None:
        """What is measured from now on is a language's."""
        self._sites: dict[str, tuple[Kind, int, int]] = {}
        self._layers: dict[str, str] = {}
        self._moments: dict[str, Moments] = {}
        self._first_moments: dict[str, Moments] = {}
        # By site, the sum of the inputs, float64 [K], and their number.
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._first_sums: dict[str, tuple[Tensor, int]] = {}

    def end_language(self, tag: str) -> LanguageStatistics:
        """All that was measured of the language but its second moments, which have joined those of the others."""
        sums, first_sums = (
            {site: (total.cpu().numpy(), count) for site, (total, count) in of_tokens.items()}
            for of_tokens in (self._sums, self._first_sums)
        )
        return LanguageStatistics(tag, self._sites, self._layers, self._moments, self._first_moments, sums, first_sums)

    def detect_layouts(self, call: Mapping[str, Tensor], device: torch.device) -> None:
        """Find out how the rows of each layer's input belong to tokens, by a few passes like this call.

        Where the model does not read such batches nothing is known, and the shapes of inputs decide.
        """
        positions = getattr(getattr(self._model, "config", None), "max_position_embeddings", None)
        if isinstance(positions, int) and 0 < positions < 16:
            return
        layers = {**self._linears, **self._experts}
        detector = LayoutDetector(layers, self._rows.shape_of_pass, output_head(self._model))
        with ExitStack() as stack:
            stack.callback(self._model.train, self._model.training)
            self._model.eval()
            for handle in self._rows.attach(self._model):
                stack.callback(handle.remove)
            stack.enter_context(torch.inference_mode())
            try:
                self.layouts = detect_layouts(self._network(call.keys()), call, detector, device)
            except Exception:  # whatever it raises, the model does not read batches, or not such short ones
                self.layouts = {}

    def _network(self, arguments: AbstractSet[str]) -> Any:
        """The part of the model that runs all measured layers and takes arguments of these names."""
        # The output head is a fifth of a small model's work; where it is not measured it need not run.
        body = getattr(self._model, "base_model", self._model)
        inside = set(map(id, body.modules()))
        hooked = [*self._linears.values(), *self._experts.values()]
        # SpeechT5's body has other names for the ids, and takes any name.
        takes = arguments <= inspect.signature(getattr(body, "forward", body)).parameters.keys()
        return body if takes and all(id(module) in inside for module in hooked) else self._model

    @contextmanager
    def attached(self, arguments: AbstractSet[str]) -> Iterator[nn.Module]:
        """What to call with arguments of these names: the model or its body, hooked, in evaluation mode and without
        gradients, as long as the block lasts.
        """
        network = self._network(arguments)
        training = self._model.training
        with ExitStack() as stack:
            stack.callback(self._model.train, training)
            self._model.eval()
            stack.callback(setattr, self, "_last", None)
            handles = [*self._rows.attach(self._model), network.register_forward_pre_hook(self._begin_window)]
            for name, module in self._experts.items():
                handles.append(module.register_forward_pre_hook(self._experts_hook(name), with_kwargs=True))
            for name, module in self._linears.items():
                handles.append(module.register_forward_pre_hook(self._input_hook(name)))
            for handle in handles:
                stack.callback(handle.remove)
            stack.enter_context(torch.inference_mode())
            yield network

    def cache(self, network: nn.Module) -> dict[str, Any]:
        """Arguments that hand a call of the network a cache which measures keys and values, where it takes one."""
        hugging_face: Any = self._model
        taken = inspect.signature(network.forward).parameters
        name = cache_name(type(network).forward)
        decodes = hasattr(self._model, "can_generate") and hugging_face.can_generate()
        # Some models keep their past in a way of their own and refuse transformers' cache.
        decodes = decodes and getattr(self._model, "_supports_default_dynamic_cache", lambda: True)()
        if name is not None and not self._summing and decodes and not hugging_face.config.is_encoder_decoder:
            from ..nn.cache import recording_cache

            return {"use_cache": True, name: recording_cache(self._model, self._measure_cached)}
        return {"use_cache": False} if "use_cache" in taken else {}

    @contextmanager
    def summing(self) -> Iterator[None]:
        """While the model reads a language's text inside, its inputs are summed and nothing else is measured."""
        self._summing = True
        try:
            yield
        finally:
            self._summing = False

    def _begin_window(self, module: nn.Module, args: Any) -> None:
        self._last = None

    def _input_hook(self, layer: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            # Projections that read the very same tensor come one after the other: it is measured once, for the first.
            if self._last is not None and self._last[0] is x and self.known.get(layer, self._last[1]) == self._last[1]:
                self._add_layer(layer, self._last[1])
                return
            self._last = (x, layer)
            self._measure_input(layer, x)

        return hook

    def _experts_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """Measures what experts read, over the tokens of all of them: a hook can see no more than what comes in."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            experts: Any = module
            named = dict(zip(("hidden_states", "top_k_index"), args, strict=False)) | kwargs
            x, index = named["hidden_states"], named["top_k_index"]
            self._measure_input(f"{name}.gate_up_proj", x)
            for expert, weight in enumerate(experts.gate_up_proj):
                tokens = torch.where(index == expert)[0]
                with self._rows.picked(x, tokens, self.layouts.get(name)):
                    gate_up = nn.functional.linear(x[tokens], weight)
                    self._measure_input(f"{name}.down_proj", experts._apply_gate(gate_up))

        return hook

    def _measure_input(self, layer: str, x: Tensor) -> None:
        """Add a layer's input x [..., K], rotated if it is to be."""
        self._add_layer(layer, layer)
        if self._summing:
            self._sum(layer, x)
            return
        values = x.float()
        if layer in self._sums:
            # First tokens are measured as they are: they are often one and the same token, of which nothing would be
            # left, and at run time another.
            total, count = self._sums[layer]
            mean = (total / count).float()
            values = values - torch.stack([mean, torch.zeros_like(mean)])[self._row_of_each(x, layer)].view(
                values.shape
            )
        if self._seed is not None:
            k = x.shape[-1]
            if k not in self._signs:
                self._signs[k] = torch.from_numpy(rotation.signs(k, self._seed)).to(x.device)
            values = ops.rotate(values, self._signs[k])
        self._measure(layer, "input", self._group_size or x.shape[-1], values, x)
        if self._sums_products:
            rows = values.reshape(-1, values.shape[-1])
            products = (rows.T @ rows).cpu().numpy()
            if layer in self.second_moments:
                products += self.second_moments[layer]
            self.second_moments[layer] = products

    def _measure_cached(self, site: str, kind: Kind, head_dim: int, x: Tensor) -> None:
        self._add_layer(site, site)
        self._measure(site, kind, head_dim, x, x)

    def _add_layer(self, layer: str, site: str) -> None:
        self._layers[layer] = self.known[layer] = site

    def _sum(self, site: str, x: Tensor) -> None:
        """Add a layer's input x [..., K] to the sums of the language and of its first tokens."""
        first = self._row_of_each(x, site) == 1
        rows = x.reshape(-1, x.shape[-1]).double()
        for sums, inputs in ((self._sums, rows[~first]), (self._first_sums, rows[first])):
            if len(inputs) == 0:
                continue
            total = inputs.sum(0)
            if not bool(torch.isfinite(total).all()):
                raise _broken("input", site, int((~torch.isfinite(inputs)).sum()))
            before, count = sums.get(site, (0.0, 0))
            sums[site] = before + total, count + len(inputs)

    def _measure(self, site: str, kind: Kind, group_size: int, values: Tensor, x: Tensor) -> None:
        """Add values [..., K], made of a layer's input x: its first tokens to the sink's statistics, others to the
        language's.
        """
        k = values.shape[-1]
        self._sites[site] = (kind, k, min(group_size, k))
        rows = values.reshape(-1, k)
        if len(rows) == 0:
            return
        row = self._row_of_each(x, site)
        measured = _moments_by_group(rows, row, min(group_size, k))
        bad = int(measured.nonfinite.sum())
        if bad:
            raise _broken(kind, site, bad)
        for total, moments in ((self._moments, measured[0]), (self._first_moments, measured[1])):
            if moments.count.any():
                total[site] = total[site] + moments if site in total else moments

    def _row_of_each(self, x: Tensor, layer: str) -> Tensor:
        """Of each row of a layer's input x [..., K] in a flat order whether it is the sink's: int32, 1 or 0."""
        leading = x.shape[:-1]
        try:
            ids = self._rows.ids_for(x, self.layouts.get(layer.removesuffix(f".{EXPERT_WEIGHTS[0]}")))
        except (RuntimeError, LaAciqError):  # rows that are not the pass's tokens have no first token among them
            ids = None
        if ids is None:
            return torch.zeros(leading.numel(), dtype=torch.int32, device=x.device)
        return ids.view(*ids.shape, *[1] * (len(leading) - ids.ndim)).expand(leading).reshape(-1)


def _broken(kind: str, layer: str, bad: int) -> LaAciqError:
    return LaAciqError(
        f"the {kind} of layer {layer!r} has {bad} NaN or infinite values; the model or its dtype is broken"
    )


def _moments_by_group(x: Tensor, row: Tensor, group_size: int) -> Moments:
    """Moments [2, groups] with histogram of x [tokens, K], by row (int32 [tokens], 0 or 1) and group along K."""
    states, histograms = [], []
    whole = x.shape[1] // group_size * group_size
    for values in (x[:, :whole].reshape(len(x), -1, group_size), x[:, whole:].unsqueeze(1)):
        if values.shape[-1] == 0:
            continue
        groups = values.shape[1]
        segment = row[:, None] * groups + torch.arange(groups, dtype=torch.int32, device=x.device)
        moments = ops.moments(values, segment, 2 * groups, histogram=True)
        states.append(moments.state.reshape(2, groups, -1))
        histograms.append(np.asarray(moments.histogram).reshape(2, groups, -1, 2))
    return Moments.from_state(np.concatenate(states, axis=1), np.concatenate(histograms, axis=1))


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        bad = int((~torch.isfinite(parameter.detach())).sum())
        if bad:
            raise LaAciqError(
                f"weight {name!r} has {bad} NaN or infinite values among {parameter.numel()}; expected finite weights"
            )
