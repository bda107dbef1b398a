"""FLAT and the methods it is compared with, one file each: a config, and a trainer that names its loss function."""
