from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import torch

from sara_core.training.inference_tensors import map_tensors

Pair = namedtuple("Pair", "a b")


@dataclass
class Record:
    tensor: torch.Tensor
    name: str


def test_tensors_are_changed_wherever_they_are_and_containers_stay_of_their_kind():
    one = torch.ones(())
    value = [Pair(one, 2), OrderedDict(x=(one, "text")), Record(one, "n"), {"y": [one]}]
    pair, ordered, record, plain = map_tensors(value, lambda tensor: tensor + 1)
    assert (type(pair), pair) == (Pair, Pair(torch.tensor(2.0), 2))
    assert (type(ordered), ordered["x"]) == (OrderedDict, (torch.tensor(2.0), "text"))
    assert (record.tensor, record.name, plain["y"]) == (2, "n", [2])
    assert value[0].a == 1
