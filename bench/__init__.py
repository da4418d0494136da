"""Measurements that anybody can repeat: `python -m bench` lists them. Outside the product; may import anything of it."""
