"""Two processes train quantizers on different rows and compare what they hold; tests start it under torchrun."""

import sys

import torch
from accelerate.utils import gather_object
from torch.nn.parallel import DistributedDataParallel

from modules.estimators import QuantizeMode
from modules.rqvae import RqVae, RqVaeConfig
from training.processes import leave_together, process_state

SETTINGS = {
    "ema": {"ema_decay": 0.9, "restart_after": 2},
    "gradient": {"restart_after": 2, "separation_weight": 1.0},
    "soft": {"restart_after": 2, "mode": QuantizeMode.GUMBEL_SOFTMAX},
}
FAR = 50.0


def trained(index: int, **settings) -> RqVae:
    """After some steps in which codes that lie far from all rows were restarted."""
    torch.manual_seed(0)
    sizes = {"input_dim": 8, "embed_dim": 4, "hidden_dims": (8,), "codebook_sizes": (16, 8)}
    model = RqVae(RqVaeConfig(**{"mode": QuantizeMode.STRAIGHT_THROUGH, **sizes, **settings}))
    model.initialize_codebooks_(torch.randn(64, 8))
    codes = model.quantizers[0].weight.detach().clone()
    codes[4:] += FAR
    model.quantizers[0].set_codes_(codes)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    torch.manual_seed(1 + index)
    for _ in range(8):
        optimizer.zero_grad()
        wrapped(torch.randn(24, 8)).loss.backward()
        optimizer.step()
    return model


state = process_state()
said = []
for name, settings in SETTINGS.items():
    model = trained(state.process_index, **settings)
    held = gather_object([model.state_dict()])
    equal = all(torch.equal(held[0][key], held[1][key]) for key in held[0])
    near = bool((model.codebooks()[0].abs() < FAR / 2).all())
    said.append(f"{name}: equal {equal}, restarted {near}")
if state.is_main_process:
    sys.stdout.write("\n".join(said) + "\n")
    sys.stdout.flush()
leave_together()
