"""Licenses of data sets, for those who pass on what was trained on them."""

# As their makers state it; a network that was trained on a set may be bound by it, too.
_LICENSES = {
    "digits": "CC BY 4.0 (Alpaydin and Kaynak 1998, UCI Machine Learning Repository)",
    "cifar10": "its authors state no license and ask to cite Krizhevsky 2009",
    "cifar100": "its authors state no license and ask to cite Krizhevsky 2009",
    "svhn_cropped": "for non-commercial use only (Netzer et al. 2011)",
    "mnist": "CC BY-SA 3.0 (LeCun and Cortes)",
    "fashion_mnist": "MIT (Zalando SE)",
    "kmnist": "CC BY-SA 4.0 (ROIS-DS Center for Open Data in the Humanities)",
    "imagenet2012": "for non-commercial research and education only, by the terms of access of image-net.org",
}


def license_of(name: str) -> str:
    """Return what is known of the license of a data set, as a phrase."""
    return _LICENSES.get(name, "not known to this package: ask whoever made the images")
