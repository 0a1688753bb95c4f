"""Meta-training on several GPUs, or several processes without one: every process has tasks of its
own, and DistributedDataParallel averages their meta-gradients.

    torchrun --nproc-per-node 2 examples/distributed.py
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fastmeta as fm

gpus = torch.cuda.device_count()
dist.init_process_group("nccl" if gpus else "gloo")
rank, processes = dist.get_rank(), dist.get_world_size()
device = torch.device(f"cuda:{rank % gpus}" if gpus else "cpu")
if gpus:
    torch.cuda.set_device(device)

torch.manual_seed(0)  # the same model everywhere
bert, tokenizer = fm.data.tiny_bert(hidden_size=64)
model = fm.models.SentenceClassifier(bert.bert, num_labels=5, scale=10).to(device)
learner = fm.MAML(fm.patch(model, fm.Params("*")), lr=0.1, steps=3)
# Weights that no loss reaches, such as an unused pooler's, ask for find_unused_parameters=True
# where they do not adapt, as DistributedDataParallel asks of any model.
parallel = DistributedDataParallel(learner)
outer = torch.optim.Adam(parallel.parameters(), lr=2e-3)

train = fm.data.builtin("train")
episodes = fm.data.Episodes(
    train, tokenizer, ways=5, shots=1, tasks=16, num_batches=20, seed=rank  # other tasks everywhere
)  # fmt: skip
for batch in episodes:
    out = parallel(batch.to(device))
    outer.zero_grad()
    out.loss.backward()  # the mean over all processes
    outer.step()

figures = torch.stack([out.loss.detach(), out.accuracy.mean()])
dist.all_reduce(figures)
if rank == 0:
    loss, accuracy = (figures / processes).tolist()
    print(f"{processes} x {batch.num_tasks} tasks: loss {loss:.3f}  accuracy {accuracy:.3f}")
dist.barrier()
dist.destroy_process_group()
