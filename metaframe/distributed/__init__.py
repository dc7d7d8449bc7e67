"""Beyond one machine: the tasks of a meta-batch divided among workers.

Tasks are independent, so what many workers have to exchange is a sum. metaframe starts no engine of
its own: it uses the process group, mesh or strategy that is active, through one switch.

    meta_value_and_grad(task_cost, distributed=True)
    maml_step(..., batched="vmap", distributed=True)        # fomaml_step, reptile_step
    MetaTrainer(..., settings=StepSettings(distributed=True))

The switch is an argument and not a wrapper or a block of code, because it belongs to how tasks are
run, as `task_map` and `chunk_size` do, and because a step that is compiled once must not change its
meaning with where it is called from. Every process passes the whole batch and runs its part of it;
all end with the same result, bit for bit. With `Share` in place of True it passes its own part
alone, as the trainer does. `session` joins the processes that torchrun or `metaframe launch`
started. See docs/scaling.md.
"""

from metaframe.backend.workers import Place as Place
from metaframe.backend.workers import Share as Share
from metaframe.backend.workers import Workers as Workers
from metaframe.distributed.session import is_first as is_first
from metaframe.distributed.session import place as place
from metaframe.distributed.session import session as session
