"""Where real data comes from: a folder of the user's, a package of the system, or a checksummed download.

Wherever a file comes from, its *content* is compared with the published one, so a file that was packed again is as good
as the original and a damaged one never trains a model.
"""

from surefoot.lab.data.cifar import CIFAR10, Batch, CifarSet, Sheets
from surefoot.lab.data.idx import FASHION_MNIST, MNIST, IdxFile, IdxSet, read_idx
from surefoot.lab.data.places import ENVIRONMENT, DataSet, Images, Split, load_images

__all__ = [
    "CIFAR10",
    "ENVIRONMENT",
    "FASHION_MNIST",
    "MNIST",
    "Batch",
    "CifarSet",
    "DataSet",
    "IdxFile",
    "IdxSet",
    "Images",
    "Sheets",
    "Split",
    "load_images",
    "read_idx",
]
