"""cuDNN's attention with a bias and its gradient, through nvidia-cudnn-frontend: a peer.

The one library call that returns dBias of a bias shared by all images; torch does not offer it.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def cudnn_attention(
    qkv: Tensor, bias: Tensor, dout: Tensor, scale: float
) -> tuple[Callable[[], object], Callable[[], object]]:
    """(forward, backward) for a packed qkv (B, N, 3, H, K), a bias (H, N, N) and dout (B, N, H, K).

    Buffers and plans are made once, here; raises what the frontend raises where it cannot.
    """
    import cudnn

    dtype = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}
    q, k, v = (t.transpose(1, 2) for t in qkv.detach().unbind(2))
    dq, dk, dv = (t.transpose(1, 2) for t in torch.empty_like(qkv).unbind(2))
    dout_BHNK = dout.transpose(1, 2)
    out = torch.empty_like(dout).transpose(1, 2)
    bias_1HNN = bias.detach().to(qkv.dtype)[None].contiguous()
    dbias = torch.empty_like(bias_1HNN)
    stats = torch.empty(*q.shape[:3], 1, dtype=torch.float32, device=qkv.device)
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)

    def build(add_nodes: Callable) -> Callable[[], object]:
        graph = cudnn.pygraph(
            io_data_type=dtype[qkv.dtype],
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=handle,
        )
        tensors = add_nodes(graph)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        size = max(graph.get_workspace_size(), 1)
        workspace = torch.empty(size, dtype=torch.uint8, device=qkv.device)
        return lambda: graph.execute(tensors, workspace, handle=handle)

    def output(node, tensor: Tensor) -> None:
        node.set_output(True).set_dim(tensor.shape).set_stride(tensor.stride())

    def forward_nodes(graph) -> dict:
        inputs = {name: graph.tensor_like(t) for name, t in (("q", q), ("k", k), ("v", v))}
        bias_node = graph.tensor_like(bias_1HNN)
        out_node, stats_node = graph.sdpa(
            name="sdpa", **inputs, bias=bias_node, attn_scale=scale, generate_stats=True
        )
        output(out_node, out)
        stats_node.set_output(True).set_data_type(cudnn.data_type.FLOAT)
        given = zip(inputs.values(), (q, k, v), strict=True)
        return {**dict(given), bias_node: bias_1HNN, out_node: out, stats_node: stats}

    def backward_nodes(graph) -> dict:
        given = {"q": q, "k": k, "v": v, "o": out, "dO": dout_BHNK, "stats": stats}
        given |= {"bias": bias_1HNN, "dBias": dbias}
        nodes = {name: graph.tensor_like(tensor) for name, tensor in given.items()}
        results = graph.sdpa_backward(name="sdpa_backward", **nodes, attn_scale=scale)
        for node, tensor in zip(results, (dq, dk, dv), strict=True):
            output(node, tensor)
        made = zip(results, (dq, dk, dv), strict=True)
        return {**{nodes[name]: tensor for name, tensor in given.items()}, **dict(made)}

    return build(forward_nodes), build(backward_nodes)
