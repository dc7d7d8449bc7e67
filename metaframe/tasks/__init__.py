"""Tasks and the samplers that make them, in NumPy, the same on every backend."""

from metaframe.tasks.digits import DIGITS_SPLIT as DIGITS_SPLIT
from metaframe.tasks.digits import digits_sampler as digits_sampler
from metaframe.tasks.digits import load_digits as load_digits
from metaframe.tasks.few_shot import ClassSplit as ClassSplit
from metaframe.tasks.few_shot import FewShotSampler as FewShotSampler
from metaframe.tasks.few_shot import split_classes as split_classes
from metaframe.tasks.image_dataset import load_image_dataset as load_image_dataset
from metaframe.tasks.image_folder import load_image_folder as load_image_folder
from metaframe.tasks.imagenet import ImageClasses as ImageClasses
from metaframe.tasks.imagenet import load_mini_imagenet as load_mini_imagenet
from metaframe.tasks.imagenet import load_tiered_imagenet as load_tiered_imagenet
from metaframe.tasks.interval import Estimate as Estimate
from metaframe.tasks.interval import mean_and_ci95 as mean_and_ci95
from metaframe.tasks.labelled import LabelledImages as LabelledImages
from metaframe.tasks.lazy import LazyImages as LazyImages
from metaframe.tasks.omniglot import Omniglot as Omniglot
from metaframe.tasks.omniglot import OneShotRun as OneShotRun
from metaframe.tasks.omniglot import load_omniglot as load_omniglot
from metaframe.tasks.omniglot import one_shot_runs as one_shot_runs
from metaframe.tasks.sampling import IndexedSampler as IndexedSampler
from metaframe.tasks.sampling import task_rng as task_rng
from metaframe.tasks.sinusoid import SinusoidTaskSampler as SinusoidTaskSampler
from metaframe.tasks.task import Task as Task
from metaframe.tasks.task import TaskSampler as TaskSampler
from metaframe.tasks.task import stack_tasks as stack_tasks
