"""The packages, and the configs beside them, which travel in the wheel as `kl_vae/configs`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["kl_vae", "kl_vae.*"]), "kl_vae.configs"],
    package_dir={"kl_vae.configs": "configs"},
    package_data={
        "kl_vae": ["py.typed"],
        "kl_vae.configs": ["*.yaml"],
        "kl_vae.inference.gallery": ["web/*"],
        "kl_vae.training.report": ["web/*"],
    },
)
