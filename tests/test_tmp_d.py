import json
import eval as evaluation
from rpo import dist, fastchat
from tests.conftest import settings, write_jsonl, WORDS
from tests.judge_server import JudgeServer

def run(*more):
    try:
        evaluation.evaluate(settings(*more, name="eval"))
    finally:
        dist.shutdown()

def test_it(tiny, tmp_path):
    write_jsonl(tmp_path/"p.jsonl", [{"instruction": f"{a} {b}"} for a in WORDS[:4] for b in WORDS[:3]])
    write_jsonl(tmp_path/"q.jsonl", [{"question_id": n, "category": fastchat.category_of(n), "turns": [WORDS[i], WORDS[i+1]]} for i,n in enumerate(range(81,161,10))])
    import shutil; shutil.copytree(tiny/"model", tmp_path/"other")
    with JudgeServer(logprobs=False) as host:
        j=("judge.model=gpt","judge.base_url="+host.url,"judge.max_tokens=50","task.batch_size=4","task.max_new_tokens=8", f"model.path=[{tiny/'model'},{tmp_path/'other'}]", f"cache_dir={tmp_path/'c'}")
        for _ in range(2):
            run("task=winrate", f"data.eval={tmp_path/'p.jsonl'}", f"run_dir={tmp_path/'w'}", *j)
        print(host.tried)
        for _ in range(2):
            run("task=mt_bench", f"task.questions={tmp_path/'q.jsonl'}", f"run_dir={tmp_path/'m'}", *j)
        print(host.tried)
        import os
        print(os.listdir(tmp_path/'m'/'model_answer'))
        run("task=mt_bench", f"task.questions={tmp_path/'q.jsonl'}", f"outputs={tmp_path/'m'/'model_answer'/os.listdir(tmp_path/'m'/'model_answer')[0]}", "task.mode=pairwise",f"baseline={tmp_path/'m'/'model_answer'/os.listdir(tmp_path/'m'/'model_answer')[1]}",f"run_dir={tmp_path/'m2'}",*j[:3], f"cache_dir={tmp_path/'c'}")
        print(host.tried)
    print((tmp_path/'w'/'results.json').read_text()[:6000])
