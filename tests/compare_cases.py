"""A comparison of networks small enough for tests."""

CHAIN = """
title: a chain of digits
kind: networks
common: [data=digits, data.size=8, net=mlp, net.depth=1, train.networks=3, real_batch=64, threads=1, device=cpu,
         engine.compile=off, eval.every=50, meta.lr=0.01]
runs:
  alone: [method=train, net.width=4, steps=100]
chains:
  key: net.width
  teacher: [method=train, steps=100]
  student: [method=kd, kd.T=2, steps=100]
  paths: [[32, 4], [32, 8, 4]]
after:
  longer: [method=kd, net.width=4, steps=200, "kd.teachers=[@{32}]"]
gaps: {32-4: [alone, "32"]}
paper: {alone: "12 %"}
smoke: []
"""
