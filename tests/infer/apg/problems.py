"""Models small enough to know everything about them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

from pyro_ext.infer import APG

GROUP_PROBS = torch.tensor([0.3, 0.7], dtype=torch.float64)
LABEL_PROBS = torch.tensor([[0.25, 0.4, 0.35], [0.4, 0.35, 0.25]], dtype=torch.float64)
LOCS = torch.tensor([[-0.8, 0.4, 1.0], [0.0, 0.8, -0.7]], dtype=torch.float64)
X = torch.tensor([0.3, -0.4], dtype=torch.float64)

STATES = list(itertools.product(range(2), range(3), range(3)))  # group, label 0, label 1


class Labels(nn.Module):
    """Points with labels, in a group of unknown kind; data sets of two points."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> None:
        with pyro.plate("data_sets", len(x), dim=-2):
            group = pyro.sample("group", dist.Categorical(GROUP_PROBS))
            observed = True if mask is None else mask
            with pyro.plate("points", x.shape[1], dim=-1), poutine.mask(mask=observed):
                label = pyro.sample("label", dist.Categorical(LABEL_PROBS[group]))
                loc = Vindex(LOCS)[group, label] + self.shift
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def log_joint(self, state: tuple[int, int, int], x: Tensor = X) -> Tensor:
        """Log joint density of one state, without Pyro."""
        group, *labels = state
        label = torch.tensor(labels)
        loc = LOCS[group, label] + self.shift
        squares = -0.5 * (x - loc).square().sum() - len(x) * 0.5 * torch.log(
            torch.tensor(2 * torch.pi, dtype=torch.float64)
        )
        return GROUP_PROBS[group].log() + LABEL_PROBS[group, label].log().sum() + squares

    def log_joints(self) -> Tensor:
        """Log joint density of all states."""
        return torch.stack([self.log_joint(state) for state in STATES])


class Tables(nn.Module):
    """Proposals that are wrong, but possible everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))
        table = [[0.4, 0.0], [0.1, 0.5], [0.0, -0.4], [-0.5, 0.3], [0.2, 0.9]]
        self.group = nn.Parameter(torch.tensor(table, dtype=torch.float64))
        self.label = nn.Parameter(
            torch.tensor([[0.5, 0.0, -0.3], [-0.2, 0.4, 0.3]], dtype=torch.float64)
        )
        slope = [[-0.4, 0.1, 0.6], [0.1, 0.3, -0.2]]
        self.slope = nn.Parameter(torch.tensor(slope, dtype=torch.float64))

    def encode(self, x: Tensor, mask: Tensor | None = None) -> None:
        with pyro.plate("data_sets", len(x), dim=-2):
            group = pyro.sample("group", dist.Categorical(logits=self.first))
        self.update_label({"group": group}, x, mask)

    def update_group(
        self, latents: Mapping[str, Tensor], x: Tensor, mask: Tensor | None = None
    ) -> None:
        labels = latents["label"] if mask is None else latents["label"] * mask
        with pyro.plate("data_sets", len(x), dim=-2):
            logits = self.group[labels.sum(-1, keepdim=True).clamp(max=4)]
            pyro.sample("group", dist.Categorical(logits=logits))

    def update_label(
        self, latents: Mapping[str, Tensor], x: Tensor, mask: Tensor | None = None
    ) -> None:
        with pyro.plate("data_sets", len(x), dim=-2), pyro.plate("points", x.shape[1], dim=-1):
            logits = self.label_logits(latents["group"], x)
            pyro.sample("label", dist.Categorical(logits=logits))

    def label_logits(self, group: Tensor, x: Tensor) -> Tensor:
        return self.label[group] + self.slope[group] * x.unsqueeze(-1)

    def log_probs(self, state: tuple[int, int, int], x: Tensor = X) -> dict[str, Tensor]:
        """Log-density of what each program proposes, without Pyro."""
        group, *labels = state
        label = torch.log_softmax(self.label_logits(torch.tensor(group), x), -1)
        of_labels = label[torch.arange(2), torch.tensor(labels)].sum()
        return {
            "encoder": torch.log_softmax(self.first, -1)[group] + of_labels,
            "group": torch.log_softmax(self.group[sum(labels)], -1)[group],
            "label": of_labels,
        }


class ExactTables(Tables):
    """The conditionals themselves."""

    def update_group(
        self, latents: Mapping[str, Tensor], x: Tensor, mask: Tensor | None = None
    ) -> None:
        label, shift = latents["label"], Labels().shift
        logits = []
        for group in range(2):
            points = dist.Normal(LOCS[group][label] + shift, 1.0).log_prob(x)
            points = points + LABEL_PROBS[group][label].log()
            logits.append(points.sum(-1, keepdim=True) + GROUP_PROBS[group].log())
        with pyro.plate("data_sets", len(x), dim=-2):
            pyro.sample("group", dist.Categorical(logits=torch.stack(logits, -1)))

    def label_logits(self, group: Tensor, x: Tensor) -> Tensor:
        loc = LOCS[group] + Labels().shift
        return LABEL_PROBS[group].log() + dist.Normal(loc, 1.0).log_prob(x.unsqueeze(-1))


def labels_sampler(
    model: nn.Module, tables: Tables, kernels: list[object] | None = None, **settings: object
) -> APG:
    """Amortized population Gibbs for the points with labels."""
    options: dict[str, object] = {
        "num_particles": 3,
        "num_sweeps": 3,
        "batch_plate": "data_sets",
        "local_plates": ["points"],
        **settings,
    }
    kernels = [tables.update_group, tables.update_label] if kernels is None else kernels
    return APG(model, tables.encode, kernels, **options)  # type: ignore[arg-type]


def state_index(latents: Mapping[str, Tensor]) -> Tensor:
    """Number of the state in ``STATES``, ``(particles, data_sets)``."""
    labels = latents["label"]
    return latents["group"].squeeze(-1) * 9 + labels[..., 0] * 3 + labels[..., 1]
