"""Pages and charts: whole HTML that fetches nothing, text that stays text whatever it holds, charts that say what they show."""

from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}
ALLOWED = VOID - {"link", "input", "br", "hr"} | set(
    "html head title style body main header div p h1 h2 h3 h4 ul li article table caption thead tbody tr th td figure "
    "figcaption details summary section span pre i svg path text tspan g rect".split()
)
NASTY = "</script><script>alert('x')</script><img src=x onerror=alert(1)> & \" ' | `*_[a](javascript:b)_*` <!-- ]]> --> \x00\x1b\x85\ud800\ufffe"


class Reader(HTMLParser):
    """Asserts that every tag closes where it should and carries nothing that runs or fetches; keeps the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        assert tag in ALLOWED, tag
        for name, value in attrs:
            assert not name.startswith("on") and name not in ("src", "href", "action", "xlink:href", "srcset"), (
                tag,
                name,
            )
            assert "url(" not in (value or "") and "javascript:" not in (value or "") or name == "aria-label", value
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)

    def tags(self, name):
        return [attrs for tag, attrs in self.seen if tag == name]
