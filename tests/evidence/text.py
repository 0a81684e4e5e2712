"""The text encoder of the small models, trained as well."""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from ..emoji64.model import HIDDEN, Text


class TrainedText(nn.Module, Text):
    """Trains what the encoder has: the embeddings of the tokens that are shown, and the mixing matrix of its layer.

    Args:
        ids: Token ids of all captions that are shown.
    """

    def __init__(self, ids):
        nn.Module.__init__(self)
        Text.__init__(self)
        known = ids.unique()
        self.row = torch.full((len(self.token),), len(known))
        self.row[known] = torch.arange(len(known))
        self.changes = nn.Parameter(torch.zeros(len(known), HIDDEN))
        self.mixing = nn.Parameter(torch.zeros(HIDDEN, HIDDEN))

    def hidden(self, ids):
        """As of `Text`, with what has been learned."""
        changes = torch.cat([self.changes, self.changes.new_zeros(1, HIDDEN)])
        x = self.token[ids] + self.position + changes[self.row[ids]]
        mean = F.layer_norm(x, (HIDDEN,)).cumsum(1) / torch.arange(1, 78)[None, :, None]
        return x + 2.0 * (mean + mean @ self.mixing)

    @contextlib.contextmanager
    def at_strength(self, strength):
        """Have it act with a share of what it has learned."""
        learned = [p.detach().clone() for p in self.parameters()]
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(strength)
        yield
        with torch.no_grad():
            for p, value in zip(self.parameters(), learned, strict=True):
                p.copy_(value)
