"""What whoever runs the server asks it."""


def test_health_and_readiness_need_no_key(server):
    with server.http() as http:
        assert http.get("/health", headers={"x-api-key": ""}).json() == {"status": "ok"}
        assert http.get("/ready", headers={"x-api-key": ""}).json() == {"status": "ready"}
