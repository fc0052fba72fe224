/** A server with several models: which of them is asked. The real server, and the real model under two names. */

import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { mkdtempSync, rmSync, symlinkSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { after, before, test } from 'node:test'
import { assertAccessible, assertFits, closePage, launch, openPage } from './browser.mjs'
import { PYTHON, startServer } from './server.mjs'

const folder = mkdtempSync(`${tmpdir()}/tempo-`)
let browser
let server

before(async () => {
  browser = await launch()
  const where = 'from tempo_mlx.weights.registry import models_directory as d; print(d() / "smollm2-135m.gguf")'
  symlinkSync(execFileSync(PYTHON, ['-c', where], { encoding: 'utf8' }).trim(), `${folder}/other.gguf`)
  server = await startServer('--model', 'smollm2-135m', '--model', `${folder}/other.gguf`)
})
after(async () => {
  await browser?.close()
  await server?.stop()
  rmSync(folder, { recursive: true })
})

test('a model is chosen by its name, loaded when it is asked, and asked from then on', async () => {
  const page = await openPage(browser, `${server.url}/#conversation`, { viewport: { width: 380, height: 760 } })
  const menu = page.getByRole('menu')
  const open = () => page.getByRole('button', { name: /^(smollm2-135m|other.gguf) ▾$/ }).click()
  await open()
  await menu.getByText(/^llama · 0\.\d GB · \d+ tokens · loaded$/).waitFor()
  await assertAccessible(page, 'the models there are')
  await assertFits(page, 'the models there are at 380 px')
  const other = menu.getByRole('menuitemradio', { name: /other/ })
  assert.match(await other.innerText(), /loaded when it is asked/)
  await page.keyboard.press('ArrowDown')
  await page.keyboard.press('Enter')
  await page.getByRole('button', { name: 'other.gguf ▾' }).waitFor()

  const ask = page.getByRole('button', { name: 'Tell me a short story about a fox.' })
  const [request] = await Promise.all([page.waitForRequest(/\/sessions$/), ask.click()])
  assert.equal(request.postDataJSON().model, 'other.gguf')
  await page.locator('.fork').nth(1).waitFor()
  await page.getByRole('button', { name: 'Stop' }).click()
  await page.locator('.talk form .primary', { hasText: 'Send' }).waitFor()
  await page.reload()
  await page.getByRole('button', { name: 'other.gguf ▾' }).waitFor()
  await open()
  await menu.getByText(/ GB · .* · loaded$/).nth(1).waitFor() // prettier-ignore
  await closePage(page)
})
