"""Optimizers (AdamW, Muon, any class by its path) and learning rate schedules."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..common.config import check_config
from ..common.errors import UserError
from .config import OptimConfig

OWN_OPTIMIZERS = ("adamw", "muon")
CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")  # do not depend on the number of steps
SHORT_WARMUP = 0.1  # fraction of the steps, where the configured warmup is longer than the run


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) and AdamW as one optimizer with disjoint parameter groups.

    As fused AdamW does, it skips the update if `found_inf`, a scalar on the device, is above 0.

    Args:
        muon, adamw: the two optimizers.
        dtype: bfloat16 or float32, in which Muon orthogonalizes updates. CPUs without bf16 matrix units take a
            hundred times as long in bfloat16.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW, dtype: torch.dtype = torch.bfloat16) -> None:
        self.parts = {"muon": muon, "adamw": adamw}
        self.dtype = dtype
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts.values() for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        muon, adamw = self.parts.values()
        adamw.found_inf = found_inf = getattr(self, "found_inf", None)
        adamw.step()
        if found_inf is None:
            self._step_muon()
            return
        # Muon cannot skip a step: restore its weights and momenta on the device.
        weights = [p for group in muon.param_groups for p in group["params"] if p.grad is not None]
        momenta = [muon.state[p].get("momentum_buffer") for p in weights]
        saved = [None if x is None else x.clone() for x in (*weights, *momenta)]
        self._step_muon()
        momenta = [muon.state[p]["momentum_buffer"] for p in weights]
        for new, old in zip((*weights, *momenta), saved, strict=True):
            new.copy_(torch.where(found_inf > 0, torch.zeros_like(new) if old is None else old, new))

    def _step_muon(self) -> None:
        if self.dtype == torch.bfloat16:
            self.parts["muon"].step()
            return
        module, name = torch.optim._muon, "_zeropower_via_newtonschulz"
        original = getattr(module, name)
        setattr(module, name, orthogonalize)  # torch's function always computes in bfloat16
        try:
            self.parts["muon"].step()
        finally:
            setattr(module, name, original)

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self.param_groups = self._groups()


def orthogonalize(
    gradient: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """The Newton-Schulz iteration of torch's Muon in float32: approximately U V^T of gradient = U S V^T.

    Args:
        gradient: (rows, columns).
        coefficients: a, b, c of X <- a X + (b A + c A^2) X with A = X X^T.
        steps: number of iterations.
        eps: lower bound of the norm that the gradient is divided by.
    """
    a, b, c = coefficients
    is_tall = gradient.size(0) > gradient.size(1)
    x = (gradient.T if is_tall else gradient).float()
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def build_optimizer(
    groups: dict[str, tuple[list[nn.Parameter], float]],
    config: OptimConfig,
    model: nn.Module | None = None,
    mixed_precision: str = "bf16",
) -> torch.optim.Optimizer:
    """Create the optimizer of a config.

    An optimizer class given by its path has the learning rate and `optim.kwargs` as its arguments. With "muon", the
    parameters that `block_matrices` returns form the group `matrices` instead of their own. Muon's updates are scaled
    to the length of AdamW's (Liu et al., arXiv 2502.16982), so one learning rate can serve both. Where it is high for
    AdamW, whose parameters include the embeddings of timestep and class, `adamw_lr_scale` lowers it for them.

    Args:
        groups: by name, the parameters and their factor on the learning rate.
        config: learning rate and other settings of all groups.
        model: the model whose matrices Muon trains; not needed for AdamW.
        mixed_precision: of the run. Muon orthogonalizes updates in bfloat16 with "bf16", otherwise in float32.

    Raises:
        UserError: if a value of the config is wrong, torch is too old for Muon, or there is no such class.
    """
    check_config(config, "optim")
    if config.name != "muon" and config.adamw_lr_scale != 1:
        raise UserError("optim.adamw_lr_scale is a factor beside Muon; without it set optim.learning_rate.")
    if config.name != "muon" and config.muon_modulations:
        raise UserError(f"optim.muon_modulations chooses what Muon trains; optim.name is {config.name}: leave it out.")
    if config.name not in OWN_OPTIMIZERS:
        return _build_by_path(groups, config)
    if config.kwargs:
        raise UserError(
            f"optim.kwargs are arguments of an optimizer class such as torch.optim.RAdam; optim.name={config.name} "
            "is configured by the keys optim.adam_* instead."
        )
    if config.name == "muon" and not hasattr(torch.optim, "Muon"):
        raise UserError(f"optim.name=muon needs torch 2.9 or newer; this is torch {torch.__version__}.")
    matrices = block_matrices(model, config.muon_modulations) if config.name == "muon" else []
    matrix_ids = set(map(id, matrices))
    adamw_groups = [
        {
            "name": name,
            "params": [p for p in parameters if id(p) not in matrix_ids],
            "lr": factor * config.adamw_lr_scale * config.learning_rate,
        }
        for name, (parameters, factor) in groups.items()
    ]
    adamw = torch.optim.AdamW(
        adamw_groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,  # one kernel, which can also skip an update on the device
    )
    if not matrices:
        return adamw
    muon = torch.optim.Muon(
        [{"name": "matrices", "params": matrices}],
        lr=config.learning_rate,
        weight_decay=config.adam_weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return MuonWithAdamW(muon, adamw, torch.bfloat16 if mixed_precision == "bf16" else torch.float32)


def _build_by_path(groups: dict[str, tuple[list[nn.Parameter], float]], config: OptimConfig) -> torch.optim.Optimizer:
    optimizer_class = find_optimizer_class(config.name)
    if "lr" in config.kwargs:
        raise UserError("optim.kwargs has lr; set optim.learning_rate instead.")
    named = [
        {"name": name, "params": parameters, "lr": factor * config.learning_rate}
        for name, (parameters, factor) in groups.items()
    ]
    try:
        return optimizer_class(named, lr=config.learning_rate, **config.kwargs)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise UserError(
            f"optim.kwargs={config.kwargs} are not arguments that {config.name} accepts: {reason}."
        ) from error


def find_optimizer_class(path: str) -> type[torch.optim.Optimizer]:
    """Import an optimizer class by its path, such as `torch.optim.RAdam`.

    Raises:
        UserError: if the module cannot be imported, or has no such optimizer.
    """
    module_name, _, class_name = path.rpartition(".")
    if not module_name:
        raise UserError(
            f"optim.name must be one of {', '.join(OWN_OPTIMIZERS)}, or the path of an optimizer class such as "
            f"torch.optim.RAdam, not {path!r}."
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError as error:
        raise UserError(
            f"optim.name={path}: the module {module_name} cannot be imported ({error}); install its package, or "
            "correct the path."
        ) from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise UserError(f"optim.name={path}: the module {module_name} has no optimizer class {class_name!r}.")
    return found


def skips_on_device(config: OptimConfig) -> bool:
    """Whether an optimizer skips its update on the device if `found_inf`, a scalar there, is above 0."""
    return config.name in OWN_OPTIMIZERS


def configured_settings(group: dict[str, Any], config: OptimConfig) -> dict[str, Any]:
    """The settings of a parameter group that come from the config, and not from a checkpoint.

    A group of another optimizer may also hold state, such as Prodigy's estimate of the step size.
    """
    if config.name in OWN_OPTIMIZERS:
        return {name: value for name, value in group.items() if name != "params"}
    return {name: group[name] for name in ("lr", "initial_lr", *config.kwargs) if name in group}


def check_optimizer(config: OptimConfig, max_train_steps: int) -> None:
    """Raise the errors of `build_optimizer` and `build_lr_scheduler`, before there is a model."""
    parameter = nn.Parameter(torch.zeros(1, 1))
    optimizer = build_optimizer({"parameters": ([parameter], 1.0)}, config, nn.Identity())
    build_lr_scheduler(optimizer, config, max_train_steps)


def block_matrices(model: nn.Module, modulations: bool = False) -> list[nn.Parameter]:
    """Weights of the linear layers in a model's blocks, with or without those of adaLN modulations."""
    names = getattr(model, "_no_split_modules", ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    return [
        layer.weight
        for block in blocks
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad and (modulations or "modulation" not in name)
    ]


def initialize_state(optimizer: torch.optim.Optimizer) -> None:
    """Create AdamW's state before the first step, because a sharded checkpoint must name all tensors it loads."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimConfig, max_train_steps: int, after: int = 0
) -> LRScheduler:
    """Create the schedule of Diffusers that the config names, in its state after `after` optimizer steps.

    Raises:
        UserError: if the name is unknown, or the schedule needs arguments that the config does not have.
    """
    if config.lr_scheduler == "piecewise_constant":
        raise UserError("optim.lr_scheduler: piecewise_constant needs rules, for which there is no config key.")
    try:
        return get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=warmup_steps(config, max_train_steps),
            num_training_steps=max_train_steps,
            last_epoch=after - 1,
        )
    except ValueError as error:
        raise UserError(f"optim.lr_scheduler: {error}.") from error


def warmup_steps(config: OptimConfig, max_train_steps: int) -> int:
    """Steps of warmup: `lr_warmup_steps`, or a tenth of the run if the run is shorter than that.

    Otherwise the learning rate would not reach its peak, and a schedule would never begin to decay.
    """
    if config.lr_scheduler == "constant" or config.lr_warmup_steps <= max_train_steps:
        return config.lr_warmup_steps
    return int(SHORT_WARMUP * max_train_steps)


def warmup_warning(config: OptimConfig, max_train_steps: int) -> str | None:
    """One sentence if the warmup is shortened, else None."""
    steps = warmup_steps(config, max_train_steps)
    if steps == config.lr_warmup_steps or not max_train_steps:
        return None
    reached = config.learning_rate * (max_train_steps - 1) / config.lr_warmup_steps
    return (
        f"optim.lr_warmup_steps={config.lr_warmup_steps} is more than train.max_train_steps={max_train_steps}, so the "
        f"learning rate would peak at {reached:.2g} instead of {config.learning_rate:g}; the warmup is shortened to "
        f"{steps} steps, and the peak learning rate is {config.learning_rate:g}."
    )
