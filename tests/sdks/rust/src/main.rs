//! What sends without an SDK: `gocm sandbox exec -- cargo run`.
fn main() -> Result<(), reqwest::Error> {
    let url = "https://fcm.googleapis.com/v1/projects/my-app/messages:send";
    let client = reqwest::blocking::Client::new();
    for (token, status) in [("rust-one", 200), ("gone-rust", 404)] {
        let message = format!(r#"{{"message": {{"token": "{token}"}}}}"#);
        let post = client.post(url).bearer_auth("any").header("content-type", "application/json").body(message);
        assert_eq!(post.send()?.status().as_u16(), status);
    }
    Ok(())
}
