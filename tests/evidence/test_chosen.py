import pytest
import torch

from .chosen import positions_of

WEIGHTS = {
    "a": torch.tensor([[0.1, -0.2, 0.3, -0.4, 0.5]]),
    "b": torch.tensor([[-5.0, 4.0, -3.0, 2.0, -1.0]]),
}
GRADIENTS = {
    "a": torch.tensor([[1.0, 9.0, 3.0, 8.0, 7.0]]),
    "b": torch.tensor([[60.0, 50.0, 20.0, 10.0, 30.0]]),
}


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("smallest", {"a": [0, 1, 2, 3]}),
        ("largest", {"b": [0, 1, 2, 3]}),
        ("layer", {"a": [0, 1], "b": [3, 4]}),
        ("gradient", {"b": [0, 1, 2, 4]}),
        ("layer gradient", {"a": [1, 3], "b": [0, 1]}),
        ("layer small gradient", {"a": [1, 2], "b": [2, 4]}),
        ("small gradient", {"a": [1, 3, 4], "b": [4]}),
    ],
)
def test_four_of_ten_weights_are_chosen(chosen, expected):
    found, _ = positions_of(WEIGHTS, chosen, 0.4, among=0.6, gradients=GRADIENTS)
    assert {name: index.tolist() for name, index in found.items()} == expected
