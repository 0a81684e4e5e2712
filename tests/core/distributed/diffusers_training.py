"""The loop of diffusers' text-to-image example on a small random UNet, with one line changed.

usage: accelerate launch or torchrun ... diffusers_training.py FOLDER [STEPS]

Leaves FOLDER/delta_RANK.pt, and goes on from FOLDER/checkpoint if it is there.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).resolve().parents[3]))
from sara_core import SaraAdamW  # noqa: E402

ACCUMULATION = 2


def make_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=16,
        attention_head_dim=4, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def pictures():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(32, 4, 8, 8, generator=generator),
        torch.randn(32, 5, 16, generator=generator),
        torch.randn(32, 4, 8, 8, generator=generator),
        torch.randint(0, 1000, (32,), generator=generator),
    )


def main(folder, steps="4"):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    unet = make_unet()
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = SaraAdamW(  # instead of torch.optim.AdamW(unet.parameters(), ...)
        unet, fraction=0.2, lr=1e-3, max_grad_norm=1.0, accumulation_steps=ACCUMULATION
    )
    loader = DataLoader(pictures(), batch_size=8 // accelerator.num_processes)
    lr_scheduler = get_scheduler(
        "linear", optimizer, num_warmup_steps=0, num_training_steps=8 * accelerator.num_processes
    )
    unet, optimizer, loader, lr_scheduler = accelerator.prepare(
        unet, optimizer, loader, lr_scheduler
    )
    done, checkpoint = 0, Path(folder, "checkpoint")
    if checkpoint.is_dir():
        accelerator.load_state(checkpoint)
        done = optimizer.optimizer.num_steps
    unet.train()
    while done < int(steps):
        for latents, words, noise, timesteps in loader:
            with accelerator.accumulate(unet):
                noisy = noise_scheduler.add_noise(latents, noise, timesteps)
                predicted = unet(noisy, timesteps, words, return_dict=False)[0]
                loss = F.mse_loss(predicted.float(), noise.float(), reduction="mean")
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                done += 1
    accelerator.wait_for_everyone()
    accelerator.save_state(checkpoint)
    delta = optimizer.optimizer.delta()
    found = {name: (entry.index, entry.values) for name, entry in delta.entries.items()}
    torch.save(found, Path(folder, f"delta_{accelerator.process_index}.pt"))
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
