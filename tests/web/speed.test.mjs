/** The page keeps up: 500 steps of up to 8 members cost at most 8 ms of scripting each. */

import assert from 'node:assert/strict'
import { after, before, test } from 'node:test'
import { closePage, launch, meter, openPage } from './browser.mjs'
import { serveCanned } from './canned.mjs'
import { large } from './runs.mjs'

const STEPS = 500
let browser

before(async () => (browser = await launch()))
after(() => browser.close())

test('a streamed step costs at most 8 ms of scripting', async (t) => {
  const served = await serveCanned(large(STEPS, 8), 20)
  t.after(served.close)
  const page = await openPage(browser, served.url)
  const metric = await meter(page)
  const generate = page.getByRole('button', { name: 'Generate', exact: true })
  await generate.waitFor()
  const [script, task] = [await metric('ScriptDuration'), await metric('TaskDuration')]
  await generate.click()
  await served.sent // waiting for something on the page would cost scripting, too
  await page.getByText(`${STEPS} steps`, { exact: true }).waitFor()
  await generate.waitFor()
  const scripting = ((await metric('ScriptDuration')) - script) / STEPS
  const all = ((await metric('TaskDuration')) - task) / STEPS
  console.log(`# ${scripting.toFixed(2)} ms of scripting a step, ${all.toFixed(2)} ms of all work of the main thread`)
  assert.ok(scripting <= 8, `${scripting} ms`)
  await closePage(page)
})
